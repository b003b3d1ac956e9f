"""GLM-4, dense (0414)."""

from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import LLAMA, decoder
from weightgeom.models.residual import Architecture, Rows

if TYPE_CHECKING:
    from transformers import Glm4Config

NAMES = replace(
    LLAMA,
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    attention_norm="post_self_attn_layernorm",
    mlp_norm="post_mlp_layernorm",
)


def architecture(config: "Glm4Config") -> Architecture:
    """Llama's map with gate and up fused, in this order, and norms behind attention and MLP as well."""
    d_mlp = config.intermediate_size
    return decoder(
        config, NAMES, rows={"gate": Rows(1, 2 * d_mlp, 0, d_mlp), "up": Rows(1, 2 * d_mlp, d_mlp, d_mlp)}
    )
