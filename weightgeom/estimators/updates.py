"""The update of one residual matrix between two models, streamed: no block larger than 4 MiB is copied."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.gram import add_gram, mirror, product
from weightgeom.models.adapters import Adapted, LowRank
from weightgeom.models.residual import ResidualMatrix
from weightgeom.models.spacing import spacing_of
from weightgeom.params import Params
from weightgeom.table import Row

log = logging.getLogger(__name__)


BLOCK = 2**20  # entries of a block, 4 MiB in fp32; each adds to the whole Gram matrix, so not smaller


@dataclass(frozen=True, eq=False)
class Update:
    """The update dW of one residual matrix, by its Gram matrix on the residual stream's side.

    The Gram matrix M is dWᵀ dW where the matrix reads and dW dWᵀ where it writes, in fp32 or better.
    All that a subspace U is asked about follows from it: ‖dW‖² = tr M, the fraction inside U is
    tr(Uᵀ M U) / tr M (`Subspace.explained`), the squared singular values are the eigenvalues of M.
    `moved_share` is the share of dW's entries that are not zero, in [0, 1]; `shape` is dW's.
    `rounding_share` is the share of ‖dW‖² that the rounding of both checkpoints would have by itself
    (`rounding_energy`), at most 1; None where neither is stored in half precision or quantised. `adapter` is
    the factor A of an adapter's update B A on the residual stream's side, r x d, where the matrix reads.
    """

    gram: Float[Tensor, "d d"]
    moved_share: float
    shape: tuple[int, int]
    rounding_share: float | None = None
    adapter: Float[Tensor, "r d"] | None = None

    @property
    def norm(self) -> float:
        """‖dW‖_F, in the units of the weights."""
        return sqrt(max(0.0, self.gram.diagonal().double().sum().item()))


@dataclass(frozen=True)
class Projection:
    """‖dW‖_F, in the units of the weights, and the shares of ‖dW‖²_F inside a subspace of either side."""

    norm: float
    right: float | None  # ‖dW R‖² / ‖dW‖²; None without R, or where dW is zero
    left: float | None  # ‖Lᵀ dW‖² / ‖dW‖²


def update_of(matrix: ResidualMatrix, after: Params, before: Params, *, written: bool = True) -> Update:
    """The update of `matrix` from `before` to `after`, subtracted in fp32 or better whatever the dtypes.

    `written` takes what reaches the residual stream, as `ResidualMatrix.written` does for each model.
    Blocks and Gram matrix are fp32 (fp64 for fp64 weights); besides them only views are held. The
    update of an adapter from its own base on is never multiplied out: its Gram matrix comes from the
    factors, and its moved share from the rows and columns in which they are not zero.

    Raises:
        ValueError: if the two shapes differ, or the update has an entry that is not finite.
    """
    factors = _factors(matrix, after, before, written)
    if factors is not None:
        return _multiplied(matrix, factors)
    return _measured(matrix, _pair(matrix, after, before, written))


def adapter_of(matrix: ResidualMatrix, after: Params, before: Params) -> Float[Tensor, "r d_in"] | None:
    """The factor A of the matrix's update B A; None where `after` is no adapter on `before`."""
    factors = _factors(matrix, after, before, written=False)
    return None if factors is None else factors.a


def zeros(matrix: ResidualMatrix, params: Params) -> Params:
    """Zeros that take no memory, to subtract where the matrix itself is wanted."""
    names = [matrix.parameter, *([matrix.norm.parameter] if matrix.norm else [])]
    weights = {name: params[name] for name in names if name in params}
    return {name: weight.new_zeros(()).expand(weight.shape) for name, weight in weights.items()}


def head_updates(
    matrix: ResidualMatrix, after: Params, before: Params, *, written: bool = True
) -> Iterator[Update]:
    """The update of each head of a read (its rows) or a write (its columns), in order; one Gram at a time.

    The Gram matrices add up to that of `update_of`. Heads are those of `matrix.heads`: key-value
    groups for k and v.

    Raises:
        ValueError: as `update_of` does.
    """
    factors = _factors(matrix, after, before, written)
    if factors is not None:
        for head in range(matrix.heads):
            yield _multiplied(matrix, factors.head(head, matrix))
        return
    pair = _pair(matrix, after, before, written)
    for head in range(matrix.heads):
        yield _measured(matrix, pair.head(head, matrix))


def projected(
    matrix: ResidualMatrix,
    after: Params,
    before: Params,
    *,
    right: Float[Tensor, "d_in k_right"] | None = None,
    left: Float[Tensor, "d_out k_left"] | None = None,
    written: bool = True,
) -> Projection:
    """Norm of the update of `matrix` and its shares inside orthonormal bases, without its Gram matrix.

    Raises:
        ValueError: as `update_of` does.
    """
    pair = _pair(matrix, after, before, written)
    across = None if right is None else right.T.to(pair.dtype).contiguous()
    along = None if left is None else left.T.to(pair.dtype).contiguous()
    inside = None  # Lᵀ dW, whose terms come in blocks of rows
    total = kept = 0.0
    row = 0
    for block in (part.delta() for part in pair.row_blocks()):
        total += _energy(block)
        if across is not None:
            kept += _energy(product(block, across))
        if along is not None:
            part = product(along[:, row : row + len(block)], block.T)
            inside = part if inside is None else inside.add_(part)
        row += len(block)
    _refuse_infinite(matrix, total)
    return Projection(
        sqrt(total),
        None if across is None or total == 0 else kept / total,
        None if inside is None or total == 0 else _energy(inside) / total,
    )


@dataclass(frozen=True, eq=False)
class _Pair:
    """One matrix of two models as views in blocks of rows, with the gains that are folded into them.

    A quantised matrix and its spacings are in memory, whole.
    """

    after: Float[Tensor, "groups size d_in"]
    before: Float[Tensor, "groups size d_in"]
    gains: tuple[Float[Tensor, "groups size 1"], Float[Tensor, "groups size 1"]] | None
    # of the grids that quantised ones are on, after and before
    spacings: tuple[Float[Tensor, "groups size d_in"] | None, Float[Tensor, "groups size d_in"] | None]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the two are subtracted."""
        both = torch.promote_types(self.after.dtype, self.before.dtype)
        return torch.promote_types(both, torch.float32)

    def part(self, groups: slice, rows: slice, columns: slice) -> "_Pair":
        """The same of a part of the matrix, still as views."""
        gains = self.gains and (self.gains[0][groups, rows], self.gains[1][groups, rows])
        after, before = (
            spacing if spacing is None else spacing[groups, rows, columns] for spacing in self.spacings
        )
        return replace(
            self,
            after=self.after[groups, rows, columns],
            before=self.before[groups, rows, columns],
            gains=gains,
            spacings=(after, before),
        )

    def head(self, head: int, matrix: ResidualMatrix) -> "_Pair":
        """The same of one head."""
        groups, size, d_in = self.after.shape
        if matrix.role == "write":
            width = d_in // matrix.heads
            return self.part(slice(None), slice(None), slice(head * width, (head + 1) * width))
        in_group = matrix.heads // groups
        group, place = divmod(head, in_group)
        width = size // in_group
        return self.part(slice(group, group + 1), slice(place * width, (place + 1) * width), slice(None))

    def delta(self) -> Float[Tensor, "rows d_in"]:
        """The difference, in memory."""
        after, before = self.after.to(self.dtype), self.before.to(self.dtype)
        if self.gains is not None:
            # Rounded product by product: with a fused multiply-add equal weights would differ.
            after, before = after * self.gains[0], before * self.gains[1]
        return torch.sub(after, before).flatten(0, 1)

    def rounding(self) -> float:
        """The energy that rounding of the two is expected to add to the difference."""
        gains = self.gains or (None, None)
        return sum(
            rounding_energy(weight, gain, spacing)
            for weight, gain, spacing in zip((self.after, self.before), gains, self.spacings, strict=True)
        )

    @property
    def is_rounded(self) -> bool:
        """Whether one of the two is stored in half precision or quantised."""
        quantised = any(spacing is not None for spacing in self.spacings)
        return quantised or is_rounded(self.after) or is_rounded(self.before)

    def row_blocks(self) -> Iterator["_Pair"]:
        """Blocks of rows, in order."""
        groups, size, d_in = self.after.shape
        rows = max(1, BLOCK // d_in)
        together = max(1, rows // size)
        for group in range(0, groups, together):
            for row in range(0, size, rows):
                yield self.part(slice(group, group + together), slice(row, row + rows), slice(None))

    def column_blocks(self) -> Iterator["_Pair"]:
        """Blocks of columns, in order."""
        groups, size, d_in = self.after.shape
        columns = max(1, BLOCK // (groups * size))
        for column in range(0, d_in, columns):
            yield self.part(slice(None), slice(None), slice(column, column + columns))


def _pair(matrix: ResidualMatrix, after: Params, before: Params, written: bool) -> _Pair:
    new, old = _view(matrix, after), _view(matrix, before)
    if new.shape != old.shape:
        raise ValueError(
            f"{matrix.name} is of shape {tuple(new.flatten(0, 1).shape)} after and of shape "
            f"{tuple(old.flatten(0, 1).shape)} before: take two checkpoints of one architecture"
        )
    spacings = (_spacing(matrix, after), _spacing(matrix, before))
    gains = (matrix.gain(after), matrix.gain(before)) if written else (None, None)
    if gains[0] is None or gains[1] is None:
        return _Pair(new, old, None, spacings)
    shape = (*new.shape[:2], 1)
    return _Pair(new, old, (gains[0].view(shape), gains[1].view(shape)), spacings)


def _view(matrix: ResidualMatrix, params: Params) -> Float[Tensor, "groups size d_in"]:
    return _oriented(matrix, params[matrix.parameter])


def _spacing(matrix: ResidualMatrix, params: Params) -> Float[Tensor, "groups size d_in"] | None:
    spacing = spacing_of(params, matrix.parameter)
    return None if spacing is None else _oriented(matrix, spacing)


def _oriented(matrix: ResidualMatrix, stored: Float[Tensor, "..."]) -> Float[Tensor, "groups size d_in"]:
    oriented = stored.T if matrix.transposed else stored
    return oriented[None] if matrix.rows is None else matrix.rows.blocks(oriented)


def _measured(matrix: ResidualMatrix, pair: _Pair) -> Update:
    groups, size, d_in = pair.after.shape
    read = matrix.role == "read"
    d = d_in if read else groups * size
    gram = torch.zeros(d, d, dtype=pair.dtype, device=pair.after.device)
    moved, noise = 0, 0.0
    for part in pair.row_blocks() if read else pair.column_blocks():
        block = part.delta()
        noise += part.rounding()
        moved += int(block.count_nonzero())
        add_gram(gram, block.T if read else block)
    energy = gram.diagonal().double().sum().item()
    _refuse_infinite(matrix, energy)
    mirror(gram)
    share = (min(1.0, noise / energy) if energy else 0.0) if pair.is_rounded else None
    return Update(gram, moved / (groups * size * d_in), (groups * size, d_in), share)


def _factors(matrix: ResidualMatrix, after: Params, before: Params, written: bool) -> LowRank | None:
    if isinstance(after, Adapted) and after.base is before:
        return after.update_of(matrix, written)
    return None


def _multiplied(matrix: ResidualMatrix, factors: LowRank) -> Update:
    gram = factors.gram(matrix.role == "read")
    _refuse_infinite(matrix, gram.diagonal().sum().item())
    rows, columns = factors.b.any(1), factors.a.any(0)
    moved = rows.double().mean() * columns.double().mean()
    adapter = factors.a if matrix.role == "read" else None
    return Update(gram, moved.item(), (len(rows), len(columns)), adapter=adapter)


def _energy(x: Float[Tensor, "rows columns"]) -> float:
    return torch.linalg.vector_norm(x).item() ** 2


def _refuse_infinite(matrix: ResidualMatrix, energy: float) -> None:
    if not isfinite(energy):
        raise ValueError(
            f"the update of {matrix.name} has entries that are not finite: one of the two "
            "checkpoints is corrupt or diverged"
        )


EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # its bits: alone, they are the power of two


MOSTLY = 0.5  # of an update's energy (ours)


def is_rounded(weight: Tensor) -> bool:
    """Whether a weight is stored in half precision."""
    return weight.dtype in EXPONENT


def rounding_energy(
    weight: Float[Tensor, "*shape"],
    gain: Float[Tensor, "..."] | None = None,
    spacing: Float[Tensor, "*shape"] | None = None,
) -> float:
    """The energy that rounding to the stored values adds to ‖W‖²_F in expectation: Σ step²/12.

    The error of rounding to nearest is uniform on an interval of one step of the grid, whose variance is
    step²/12. The step is the weight's unit in the last place, or the `spacing` of a quantised weight; of fp32
    and better it counts as zero. `gain` multiplies the rows that it is broadcast over.
    """
    if spacing is None and not is_rounded(weight):
        return 0.0
    scale = 1.0
    if spacing is None:
        spacing = (weight.view(torch.int16) & EXPONENT[weight.dtype]).view(weight.dtype).float()
        scale = torch.finfo(weight.dtype).eps
    step = spacing.float() if gain is None else spacing * gain
    return float(torch.linalg.vector_norm(step)) ** 2 * scale**2 / 12


def warn_of_rounding(rows: Sequence[Row]) -> None:
    """Say so in the log if updates, by their rows `rounding_share`, are mostly rounding."""
    shares = [row["value"] for row in rows if row["quantity"] == "rounding_share"]
    mostly = sum(share > MOSTLY for share in shares)
    if mostly:
        log.warning(
            "%d of %d updates are mostly rounding (rounding_share over %g): they are too small for the"
            " precision that the checkpoints are stored in, so compare fp32 ones",
            *(mostly, len(shares), MOSTLY),
        )
