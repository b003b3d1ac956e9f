"""Gemma-3: text alone (1B and below), or the text part of the larger ones (`gemma3`)."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig


def architecture(config: "Gemma3TextConfig") -> Architecture:
    """Gemma-2's map; q and k are normed per head after the projection, which the map leaves out."""
    return gated_decoder(config, post_norms=True, norm_offset=1.0)
