"""Gemma-2."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Gemma2Config


def architecture(config: "Gemma2Config") -> Architecture:
    """Llama's map with norms in front of and behind attention and MLP, whose gain is 1 + weight."""
    return gated_decoder(config, post_norms=True, norm_offset=1.0)
