"""BLOOM."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder, fused_by_group
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import BloomConfig

QKV = "self_attention.query_key_value"
NAMES = Names(
    embed="transformer.word_embeddings",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    q=QKV,
    k=QKV,
    v=QKV,
    o="self_attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def architecture(config: "BloomConfig") -> Architecture:
    """GPT-NeoX's order of the fused rows; the embeddings pass a LayerNorm before they enter the stream."""
    return decoder(config, NAMES, rows=fused_by_group(config, config.num_attention_heads))
