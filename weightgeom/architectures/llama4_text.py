"""Llama 4, its text model."""

from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import LLAMA, decoder
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Llama4TextConfig

NAMES = replace(
    LLAMA, gate="feed_forward.gate_proj", up="feed_forward.up_proj", down="feed_forward.down_proj"
)


def architecture(config: "Llama4TextConfig") -> Architecture:
    """Llama's map with a router, transposed experts and a shared expert in the layers named as sparse.

    An expert reads the block's input times the router's score, which leaves its direction as it is.
    """
    mixture = Mixture(
        config.num_local_experts, "feed_forward", "router", shared="shared_expert", transposed=True
    )
    sparse = config.moe_layers or []
    return with_experts(decoder(config, NAMES), config.model_type, mixture, lambda layer: layer in sparse)
