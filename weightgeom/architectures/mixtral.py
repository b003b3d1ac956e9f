"""Mixtral."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import MixtralConfig


def architecture(config: "MixtralConfig") -> Architecture:
    """Llama's map with a router and experts in every layer, which the disk names `w1`, `w3` and `w2`."""
    return with_experts(gated_decoder(config), config.model_type, Mixture(config.num_local_experts))
