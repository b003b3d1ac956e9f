"""GPT-2."""

from typing import TYPE_CHECKING

from weightgeom.models.residual import Architecture, Norm, ResidualMatrix, Rows, input_sites

if TYPE_CHECKING:
    from transformers import GPT2Config


def architecture(config: "GPT2Config") -> Architecture:
    """Every weight stored transposed (Conv1D), q, k and v fused as thirds of its columns."""
    matrices = tuple(matrix for layer in range(config.n_layer) for matrix in _layer(config, layer))
    return Architecture(
        d_model=config.n_embd,
        n_layers=config.n_layer,
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        d_head=config.n_embd // config.n_head,
        matrices=matrices,
        sites=input_sites(matrices),
        embed="transformer.wte.weight",
        unembed="lm_head.weight",
        final_norm=Norm("transformer.ln_f.weight"),
        aliases={},
        tied=config.tie_word_embeddings,
    )


def _layer(config: "GPT2Config", layer: int) -> tuple[ResidualMatrix, ...]:
    d, heads = config.n_embd, config.n_head
    block = f"transformer.h.{layer}"
    qkv = f"{block}.attn.c_attn"
    return (
        ResidualMatrix(layer, "q", qkv, heads, Rows(1, 3 * d, 0, d), transposed=True),
        ResidualMatrix(layer, "k", qkv, heads, Rows(1, 3 * d, d, d), transposed=True),
        ResidualMatrix(layer, "v", qkv, heads, Rows(1, 3 * d, 2 * d, d), transposed=True),
        ResidualMatrix(layer, "up", f"{block}.mlp.c_fc", transposed=True),
        ResidualMatrix(layer, "o", f"{block}.attn.c_proj", heads, transposed=True),
        ResidualMatrix(layer, "down", f"{block}.mlp.c_proj", transposed=True),
    )
