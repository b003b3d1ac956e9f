"""Command R7B and the other models like it."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Cohere2Config


def architecture(config: "Cohere2Config") -> Architecture:
    """Llama's map with attention and MLP side by side behind one LayerNorm; logits are multiplied."""
    return decoder(config, parallel=True)
