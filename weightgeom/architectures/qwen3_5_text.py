"""Qwen3.5 and Qwen3.6, dense."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder, head_size
from weightgeom.models.mixers import fused, mixed
from weightgeom.models.residual import Architecture, ResidualMatrix, Rows

if TYPE_CHECKING:
    from transformers import Qwen3_5TextConfig

Q = "self_attn.q_proj"
NAMES = Names(q=Q, attention_gate=Q)


def architecture(config: "Qwen3_5TextConfig") -> Architecture:
    """Softmax attention in every fourth layer, its output gated by rows of q_proj; Gated DeltaNet in the others.

    The gain of a norm is 1 + weight, but inside linear attention.
    """
    width, heads = head_size(config), config.num_attention_heads
    rows = {kind: Rows(heads, 2 * width, start, width) for kind, start in (("q", 0), ("attention_gate", width))}
    types = config.layer_types or []
    return mixed(
        decoder(config, NAMES, rows=rows, norm_offset=1.0),
        [("mlp",) if kind == "linear_attention" else ("attention", "mlp") for kind in types],
        {
            layer: delta_net(config, layer)
            for layer, kind in enumerate(types)
            if kind == "linear_attention"
        },
    )


def delta_net(config: "Qwen3_5TextConfig", layer: int) -> list[ResidualMatrix]:
    """Linear attention: z gates its output, b is the strength of writing to its state, a the decay."""
    module = f"model.layers.{layer}.linear_attn"
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    k, v = keys * config.linear_key_head_dim, values * config.linear_value_head_dim
    parts = {"linear_q": (keys, k), "linear_k": (keys, k), "linear_v": (values, v)}
    return [
        *fused(layer, f"{module}.in_proj_qkv", parts),
        ResidualMatrix(layer, "linear_z", f"{module}.in_proj_z", values),
        ResidualMatrix(layer, "linear_b", f"{module}.in_proj_b", values),
        ResidualMatrix(layer, "linear_a", f"{module}.in_proj_a", values),
        ResidualMatrix(layer, "linear_o", f"{module}.out_proj", values),
    ]
