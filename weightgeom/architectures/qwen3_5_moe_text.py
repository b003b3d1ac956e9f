"""Qwen3.5 and Qwen3.6 with a mixture of experts."""

from typing import TYPE_CHECKING

from weightgeom.models.mixers import gated_hybrid
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Qwen3_5MoeTextConfig


def architecture(config: "Qwen3_5MoeTextConfig") -> Architecture:
    """Qwen3.5's map with a router, experts, and a weighted shared expert in every layer."""
    mixture = Mixture(config.num_experts, shared="shared_expert", shared_router="shared_expert_gate")
    return with_experts(gated_hybrid(config), config.model_type, mixture)
