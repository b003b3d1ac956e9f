"""Phi-3 and Phi-4."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder, head_size
from weightgeom.models.residual import Architecture, ResidualMatrix, Rows

if TYPE_CHECKING:
    from transformers import Phi3Config, PreTrainedConfig


def architecture(config: "Phi3Config") -> Architecture:
    """Llama's map with q, k, v fused in one weight and gate, up (in this order) in another."""
    return gated_decoder(config, reads=_fused_reads)


def _fused_reads(config: "PreTrainedConfig", layer: int) -> tuple[ResidualMatrix, ...]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q, kv = heads * head_size(config), groups * head_size(config)
    d_mlp = config.intermediate_size
    qkv = f"model.layers.{layer}.self_attn.qkv_proj"
    gate_up = f"model.layers.{layer}.mlp.gate_up_proj"
    return (
        ResidualMatrix(layer, "q", qkv, heads, Rows(1, q + 2 * kv, 0, q)),
        ResidualMatrix(layer, "k", qkv, groups, Rows(1, q + 2 * kv, q, kv)),
        ResidualMatrix(layer, "v", qkv, groups, Rows(1, q + 2 * kv, q + kv, kv)),
        ResidualMatrix(layer, "gate", gate_up, rows=Rows(1, 2 * d_mlp, 0, d_mlp)),
        ResidualMatrix(layer, "up", gate_up, rows=Rows(1, 2 * d_mlp, d_mlp, d_mlp)),
    )
