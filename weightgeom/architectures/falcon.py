"""Falcon 7B, 40B, 180B and RW."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder, fused_by_group
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import FalconConfig

QKV = "self_attention.query_key_value"
NAMES = Names(
    *("transformer.word_embeddings", "transformer.h", "transformer.ln_f", "lm_head", QKV, QKV, QKV),
    o="self_attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def architecture(config: "FalconConfig") -> Architecture:
    """Fused by group: one group of all heads (7B), several (40B, 180B), or one for each head (RW)."""
    groups = 1 if config.multi_query else config.num_attention_heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads or config.num_attention_heads
    parallel = bool(config.new_decoder_architecture or config.parallel_attn)
    return decoder(config, NAMES, rows=fused_by_group(config, groups), groups=groups, parallel=parallel)
