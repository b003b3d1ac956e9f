"""Qwen3.5 and Qwen3.6, dense."""

from typing import TYPE_CHECKING

from weightgeom.models.mixers import gated_hybrid
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Qwen3_5TextConfig


def architecture(config: "Qwen3_5TextConfig") -> Architecture:
    """Linear attention and, in every fourth layer, softmax attention with gated outputs."""
    return gated_hybrid(config)
