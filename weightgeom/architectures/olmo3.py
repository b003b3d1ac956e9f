"""OLMo-3."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Olmo3Config


def architecture(config: "Olmo3Config") -> Architecture:
    """OLMo-2's map: sliding windows limit which tokens are seen, not which matrices read or write."""
    return gated_decoder(config, post_norms=True)
