"""The residual map of multi-head latent attention: the stream is read into latents of low rank."""

from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.residual import ATTENTION, Architecture, ResidualMatrix, Rows, input_sites, module_path

if TYPE_CHECKING:
    from transformers import DeepseekV3Config


def with_latent_attention(dense: Architecture, config: "DeepseekV3Config") -> Architecture:
    """A decoder whose q, k and v are made of latents, as in DeepSeek-V2 and V3 (arXiv:2405.04434, eq. 9-19).

    `q_a` reads the latent of the queries, `kv_a` that of keys and values, and `k_rope`, fused with it, the
    rotary part of the keys, which all heads share. Without a rank for the queries `q` reads them as usual.
    `q_b` and `kv_b`, which make queries, keys and values of the latents, are inner matrices: neither their
    input nor their output is the residual stream. The norms of the latents lie on the inner side of q_a and
    kv_a and are left out as well.
    """
    rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
    matrices: list[ResidualMatrix] = []
    inner: list[str] = []
    for layer in range(dense.n_layers):
        of_layer = [matrix for matrix in dense.matrices if matrix.layer == layer]
        path = module_path(dense, layer, ATTENTION)
        if config.q_lora_rank is None:
            matrices += [matrix for matrix in of_layer if matrix.kind == "q"]
        else:
            matrices.append(ResidualMatrix(layer, "q_a", f"{path}.q_a_proj"))
            inner.append(f"{path}.q_b_proj.weight")
        matrices += [
            ResidualMatrix(layer, "kv_a", f"{path}.kv_a_proj_with_mqa", rows=Rows(1, rank + rotary, 0, rank)),
            ResidualMatrix(
                layer, "k_rope", f"{path}.kv_a_proj_with_mqa", rows=Rows(1, rank + rotary, rank, rotary)
            ),
            *(matrix for matrix in of_layer if matrix.kind not in ("q", "k", "v")),
        ]
        inner.append(f"{path}.kv_b_proj.weight")
    return replace(
        dense,
        d_head=config.v_head_dim,
        d_query=config.qk_nope_head_dim + rotary,
        matrices=tuple(matrices),
        sites=input_sites(matrices),
        inner=tuple(inner),
    )
