"""Qwen3, dense."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Qwen3Config


def architecture(config: "Qwen3Config") -> Architecture:
    """Llama's map; q and k are normed per head after the projection, which the map leaves out."""
    return gated_decoder(config)
