"""GPT-NeoX and Pythia."""

from typing import TYPE_CHECKING

from weightgeom.models.residual import Architecture, Norm, ResidualMatrix, Rows, input_sites

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig


def architecture(config: "GPTNeoXConfig") -> Architecture:
    """Attention and MLP side by side, each behind a LayerNorm of its own; q, k, v fused by head.

    The rows of the fused weight are ordered [head][q, k, v][d_head], not in thirds. The
    unembedding is `embed_out` on disk and `lm_head` in memory.
    """
    matrices = tuple(matrix for layer in range(config.num_hidden_layers) for matrix in _layer(config, layer))
    return Architecture(
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        matrices=matrices,
        sites=input_sites(matrices),
        embed="gpt_neox.embed_in.weight",
        unembed="lm_head.weight",
        final_norm=Norm("gpt_neox.final_layer_norm.weight"),
        aliases={"embed_out.weight": "lm_head.weight"},
        tied=config.tie_word_embeddings,
        parallel=config.use_parallel_residual,
    )


def _layer(config: "GPTNeoXConfig", layer: int) -> tuple[ResidualMatrix, ...]:
    heads = config.num_attention_heads
    d_head = config.hidden_size // heads
    block = f"gpt_neox.layers.{layer}"
    qkv = f"{block}.attention.query_key_value"
    return (
        ResidualMatrix(layer, "q", qkv, heads, Rows(heads, 3 * d_head, 0, d_head)),
        ResidualMatrix(layer, "k", qkv, heads, Rows(heads, 3 * d_head, d_head, d_head)),
        ResidualMatrix(layer, "v", qkv, heads, Rows(heads, 3 * d_head, 2 * d_head, d_head)),
        ResidualMatrix(layer, "up", f"{block}.mlp.dense_h_to_4h"),
        ResidualMatrix(layer, "o", f"{block}.attention.dense", heads),
        ResidualMatrix(layer, "down", f"{block}.mlp.dense_4h_to_h"),
    )
