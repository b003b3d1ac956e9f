"""Qwen2 and Qwen2.5."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Qwen2Config


def architecture(config: "Qwen2Config") -> Architecture:
    """Llama's map, with biases on q, k and v."""
    return gated_decoder(config)
