"""SmolLM3."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import SmolLM3Config


def architecture(config: "SmolLM3Config") -> Architecture:
    """Llama's map; layers without rotary positions read and write as the others do."""
    return gated_decoder(config)
