"""Granite, dense."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import GraniteConfig


def architecture(config: "GraniteConfig") -> Architecture:
    """Llama's map, with the outputs of o and down multiplied by a constant on the way to the stream.

    The multipliers of embeddings, attention scores and logits change no read or write.
    """
    return decoder(config, factor=config.residual_multiplier)
