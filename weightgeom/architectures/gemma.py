"""Gemma (1)."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import GemmaConfig


def architecture(config: "GemmaConfig") -> Architecture:
    """Llama's map with norms whose gain is 1 + weight, none of them behind attention or MLP."""
    return decoder(config, norm_offset=1.0)
