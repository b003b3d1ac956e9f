"""gpt-oss."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import GptOssConfig


def architecture(config: "GptOssConfig") -> Architecture:
    """Llama's map with biases, attention sinks, and a router and experts in every layer.

    The experts' weights are transposed, and rows of gate and up take turns in them; their biases, and that
    of the router, are no part of the map.
    """
    mixture = Mixture(config.num_local_experts, router="router", transposed=True, interleaved=True)
    return with_experts(gated_decoder(config), config.model_type, mixture)
