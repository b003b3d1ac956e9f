"""Apertus."""

from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import LLAMA, decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import ApertusConfig


def architecture(config: "ApertusConfig") -> Architecture:
    """Llama's map without a gate; q and k are normed per head after the projection."""
    return decoder(config, replace(LLAMA, gate=None))
