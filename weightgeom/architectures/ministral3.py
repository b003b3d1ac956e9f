"""Ministral 3, the text part of `mistral3`."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Ministral3Config


def architecture(config: "Ministral3Config") -> Architecture:
    """Llama's map: queries are scaled by their position after the projection, which the map leaves out."""
    return decoder(config)
