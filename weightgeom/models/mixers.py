"""Decoders with mixers that are no softmax attention: linear attention, convolutions, Mamba-2."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from weightgeom.models.residual import Architecture, Block, Kind, ResidualMatrix, Rows, input_sites


def mixed(
    decoder: Architecture,
    blocks: Sequence[Collection[Block]],
    mixers: Mapping[int, Sequence[ResidualMatrix]],
) -> Architecture:
    """A decoder whose layers keep these of their blocks, with mixers of another sort in some layers."""
    matrices: list[ResidualMatrix] = []
    for layer, kept in enumerate(blocks):
        matrices += mixers.get(layer, ())
        matrices += (one for one in decoder.matrices if one.layer == layer and one.block in kept)
    return replace(decoder, matrices=tuple(matrices), sites=input_sites(matrices))


def fused(
    layer: int, module: str, parts: Mapping[Kind, tuple[int, int]], groups: int = 1
) -> list[ResidualMatrix]:
    """Matrices that lie one after the other in each of `groups` blocks of rows of one weight.

    `parts` has of each kind the heads in all and the rows in a block.
    """
    stride, start = sum(size for _, size in parts.values()), 0
    matrices = []
    for kind, (heads, size) in parts.items():
        matrices.append(ResidualMatrix(layer, kind, module, heads, Rows(groups, stride, start, size)))
        start += size
    return matrices


def mamba(layer: int, module: str, *, heads: int, inner: int, groups: int, state: int) -> list[ResidualMatrix]:
    """Mamba-2: z gates the output of the scan over x, B writes its state, C reads it, dt is the step.

    Heads share B and C in groups.
    """
    parts: dict[Kind, tuple[int, int]] = {
        "mamba_z": (heads, inner),
        "mamba_x": (heads, inner),
        "mamba_B": (groups, groups * state),
        "mamba_C": (groups, groups * state),
        "mamba_dt": (heads, heads),
    }
    out = ResidualMatrix(layer, "mamba_o", f"{module}.out_proj", heads)
    return [*fused(layer, f"{module}.in_proj", parts), out]
