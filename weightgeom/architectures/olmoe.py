"""OLMoE."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import OlmoeConfig


def architecture(config: "OlmoeConfig") -> Architecture:
    """Llama's map with a router and experts in every layer.

    q and k are normed after the projection, over all heads at once; the map leaves that out.
    """
    return with_experts(gated_decoder(config), config.model_type, Mixture(config.num_experts))
