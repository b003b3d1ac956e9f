"""DeepSeek-V3 and R1, and models of their type."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.latent_attention import with_latent_attention
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import DeepseekV3Config


def architecture(config: "DeepseekV3Config") -> Architecture:
    """Latent attention; behind the first dense layers a router, its experts, and a shared expert.

    Several shared experts are stored, and counted here, as one wide one. The biases that balance the router's
    choices are buffers, which no gradient trains.
    """
    dense = with_latent_attention(gated_decoder(config), config)
    mixture = Mixture(config.n_routed_experts, shared="shared_experts")
    first = config.first_k_dense_replace or 0
    return with_experts(dense, config.model_type, mixture, lambda layer: layer >= first)
