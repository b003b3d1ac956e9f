"""GPT-NeoX and Pythia."""

from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder, fused_by_group
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

QKV = "attention.query_key_value"
NAMES = Names(
    *("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head", QKV, QKV, QKV),
    o="attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def architecture(config: "GPTNeoXConfig") -> Architecture:
    """Attention and MLP side by side, each behind a LayerNorm of its own; q, k, v fused by head.

    The rows of the fused weight are ordered [head][q, k, v][d_head], not in thirds.
    """
    rows = fused_by_group(config, config.num_attention_heads)
    mapped = decoder(config, NAMES, rows=rows, parallel=config.use_parallel_residual)
    return replace(mapped, model_type="gpt_neox")  # for its names on disk, also of a network built on it
