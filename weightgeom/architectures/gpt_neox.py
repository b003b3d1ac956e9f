"""GPT-NeoX and Pythia."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder, head_size
from weightgeom.models.residual import Architecture, Rows

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

NAMES = Names(
    embed="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    q="attention.query_key_value",
    k="attention.query_key_value",
    v="attention.query_key_value",
    o="attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def architecture(config: "GPTNeoXConfig") -> Architecture:
    """Attention and MLP side by side, each behind a LayerNorm of its own; q, k, v fused by head.

    The rows of the fused weight are ordered [head][q, k, v][d_head], not in thirds. The
    unembedding is `embed_out` on disk and `lm_head` in memory.
    """
    heads, d_head = config.num_attention_heads, head_size(config)
    return decoder(
        config,
        NAMES,
        rows={
            "q": Rows(heads, 3 * d_head, 0, d_head),
            "k": Rows(heads, 3 * d_head, d_head, d_head),
            "v": Rows(heads, 3 * d_head, 2 * d_head, d_head),
        },
        parallel=config.use_parallel_residual,
        aliases={"embed_out.weight": "lm_head.weight"},
    )
