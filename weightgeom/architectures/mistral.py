"""Mistral."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import MistralConfig


def architecture(config: "MistralConfig") -> Architecture:
    """Llama's map: the sliding window limits which tokens are seen, not which matrices read or write."""
    return gated_decoder(config)
