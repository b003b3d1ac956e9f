"""Qwen3 with a mixture of experts (30B-A3B)."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.mixture import is_sparse
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig


def architecture(config: "Qwen3MoeConfig") -> Architecture:
    """Llama's map with a router and many small MLPs in the layers that are not named as dense."""
    return gated_decoder(config, sparse=lambda layer: is_sparse(config, layer))
