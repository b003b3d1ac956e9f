"""Qwen3-Next."""

from typing import TYPE_CHECKING

from weightgeom.models.mixers import gated_hybrid
from weightgeom.models.mixture import Mixture, is_sparse, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Qwen3NextConfig


def architecture(config: "Qwen3NextConfig") -> Architecture:
    """Qwen3.5's map with linear attention fused by head, and experts in the layers not named as dense."""
    mixture = Mixture(config.num_experts, shared="shared_expert", shared_router="shared_expert_gate")
    whole = gated_hybrid(config, by_head=True)
    return with_experts(whole, config.model_type, mixture, lambda layer: is_sparse(config, layer))
