"""Phi-3 and Phi-4."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder, head_size, kv_heads
from weightgeom.models.residual import Architecture, Rows

if TYPE_CHECKING:
    from transformers import Phi3Config

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
NAMES = Names(q=QKV, k=QKV, v=QKV, gate=GATE_UP, up=GATE_UP)


def architecture(config: "Phi3Config") -> Architecture:
    """Llama's map with q, k, v fused in one weight and gate, up (in this order) in another."""
    q, kv = config.num_attention_heads * head_size(config), kv_heads(config) * head_size(config)
    d_mlp = config.intermediate_size
    return decoder(
        config,
        NAMES,
        rows={
            "q": Rows(1, q + 2 * kv, 0, q),
            "k": Rows(1, q + 2 * kv, q, kv),
            "v": Rows(1, q + 2 * kv, q + kv, kv),
            "gate": Rows(1, 2 * d_mlp, 0, d_mlp),
            "up": Rows(1, 2 * d_mlp, d_mlp, d_mlp),
        },
    )
