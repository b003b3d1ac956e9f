"""Decoders with mixers that are no softmax attention: linear attention, convolutions, Mamba-2."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightgeom.models.decoder import Names, decoder, head_size
from weightgeom.models.residual import Architecture, Block, Kind, ResidualMatrix, Rows, input_sites

Parts = Mapping[Kind, tuple[int, int]]
GATED = Names(q="self_attn.q_proj", attention_gate="self_attn.q_proj")


def mixed(
    whole: Architecture, blocks: Sequence[Collection[Block]], mixers: Mapping[int, Sequence[ResidualMatrix]]
) -> Architecture:
    """A decoder whose layers keep these of their blocks, with mixers of another sort in some layers."""
    matrices: list[ResidualMatrix] = []
    for layer, kept in enumerate(blocks):
        matrices += mixers.get(layer, ())
        matrices += (matrix for matrix in whole.matrices if matrix.layer == layer and matrix.block in kept)
    return replace(whole, matrices=tuple(matrices), sites=input_sites(matrices))


def fused(layer: int, module: str, parts: Parts, groups: int = 1) -> list[ResidualMatrix]:
    """Matrices that lie one after the other in each of `groups` blocks of rows of one weight.

    `parts` has the heads of each kind in all, and its rows in a block.
    """
    stride, start = sum(size for _, size in parts.values()), 0
    matrices = []
    for kind, (heads, size) in parts.items():
        matrices.append(ResidualMatrix(layer, kind, module, heads, Rows(groups, stride, start, size)))
        start += size
    return matrices


def mamba(layer: int, module: str, heads: int, inner: int, groups: int, state: int) -> list[ResidualMatrix]:
    """Mamba-2: z gates the output of the scan over x, B writes its state, C reads it, dt is the step.

    Heads share B and C in groups.
    """
    parts: Parts = {
        "mamba_z": (heads, inner),
        "mamba_x": (heads, inner),
        "mamba_B": (groups, groups * state),
        "mamba_C": (groups, groups * state),
        "mamba_dt": (heads, heads),
    }
    out = ResidualMatrix(layer, "mamba_o", f"{module}.out_proj", heads)
    return [*fused(layer, f"{module}.in_proj", parts), out]


def delta_net(config: Any, layer: int, by_head: bool) -> list[ResidualMatrix]:
    """Gated DeltaNet: z gates its output, b is the strength of writing to its state, a the state's decay.

    Fused in two weights `by_head` of the keys, each of which serves as many values (Qwen3-Next), or apart but
    for q, k and v (Qwen3.5).
    """
    module = f"model.layers.{layer}.linear_attn"
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    k, v = config.linear_key_head_dim, config.linear_value_head_dim
    out = ResidualMatrix(layer, "linear_o", f"{module}.out_proj", values)
    if by_head:
        each = values // keys
        qkvz: Parts = {
            "linear_q": (keys, k),
            "linear_k": (keys, k),
            "linear_v": (values, each * v),
            "linear_z": (values, each * v),
        }
        ba: Parts = {"linear_b": (values, each), "linear_a": (values, each)}
        apart = fused(layer, f"{module}.in_proj_qkvz", qkvz, keys)
        return [*apart, *fused(layer, f"{module}.in_proj_ba", ba, keys), out]
    qkv: Parts = {
        "linear_q": (keys, keys * k),
        "linear_k": (keys, keys * k),
        "linear_v": (values, values * v),
    }
    others: dict[Kind, str] = {"linear_z": "in_proj_z", "linear_b": "in_proj_b", "linear_a": "in_proj_a"}
    apart = [ResidualMatrix(layer, kind, f"{module}.{name}", values) for kind, name in others.items()]
    return [*fused(layer, f"{module}.in_proj_qkv", qkv), *apart, out]


def gated_hybrid(config: Any, by_head: bool = False) -> Architecture:
    """Qwen's decoder of Gated DeltaNet and, in every fourth layer, softmax attention with gated outputs.

    Of each head, q_proj has the rows of q and behind them those of the gate. The gain of a norm is
    1 + weight, but inside a mixer.
    """
    heads, width = config.num_attention_heads, head_size(config)
    starts: dict[Kind, int] = {"q": 0, "attention_gate": width}
    linear = [kind == "linear_attention" for kind in config.layer_types]
    return mixed(
        decoder(
            config,
            GATED,
            rows={kind: Rows(heads, 2 * width, start, width) for kind, start in starts.items()},
            norm_offset=1.0,
        ),
        [("mlp",) if is_linear else ("attention", "mlp") for is_linear in linear],
        {layer: delta_net(config, layer, by_head) for layer, is_linear in enumerate(linear) if is_linear},
    )
