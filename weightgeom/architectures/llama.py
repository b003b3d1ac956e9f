"""Llama 1 to 3 and the models built like them."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import LlamaConfig


def architecture(config: "LlamaConfig") -> Architecture:
    """Separate projections behind one norm each for attention and MLP."""
    return gated_decoder(config)
