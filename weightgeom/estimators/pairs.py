"""One residual matrix of two models with its decompositions, and the walk that hands it to several probes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.estimators.moments import Moment
from weightgeom.estimators.reference_subspaces import Inputs, input_moments
from weightgeom.estimators.updates import Update, update_of
from weightgeom.geometry.subspace import eigenpairs, eigenvalues
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import Adapted
from weightgeom.models.residual import ResidualMatrix, Site
from weightgeom.params import Params
from weightgeom.table import Row

SMALLEST = 1e-4  # singular values over the largest: the squares of smaller ones lose half their digits


@dataclass(frozen=True, eq=False)
class Decomposition:
    """W = L diag(values) Rᵀ in fp64, strongest direction first, with r = min(d_out, d_in)."""

    left: Float[Tensor, "d_out r"]
    values: Float[Tensor, " r"]
    right: Float[Tensor, "d_in r"]

    @classmethod
    def of(cls, matrix: Float[Tensor, "d_out d_in"]) -> "Decomposition":
        """From the eigenvectors of the Gram matrix of the smaller side, four times as fast as an SVD.

        A matrix with singular values below 1e-4 of the largest is given to the SVD.
        """
        wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
        squares, vectors = eigenpairs(wide @ wide.T)
        values, short = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
        if values[-1] > SMALLEST * values[0]:
            long = wide.T @ (short / values)
        else:
            short, values, transposed = torch.linalg.svd(wide, full_matrices=False)
            long = transposed.T
        left, right = (short, long) if matrix.shape[0] <= matrix.shape[1] else (long, short)
        return cls(left, values, right)

    def top(self, matrix: ResidualMatrix, k: int) -> Float[Tensor, "d _"]:
        """The first k directions on the residual stream's side."""
        return (self.right if matrix.role == "read" else self.left)[:, :k]


@dataclass(frozen=True, eq=False)
class MatrixPair:
    """A residual matrix before and after an update, as the stream receives it; all is computed once.

    Both are in fp32 (fp64 if stored so) on the CPU; `update` is `update_of` without its share of rounding,
    with its Gram matrix on the residual stream's side. `stored_before` and `stored_after` are without the
    gain of a norm behind them.
    """

    matrix: ResidualMatrix
    start: Params
    params: Params

    @cached_property
    def _read(self) -> tuple[Params, Params]:
        """The tensors of the matrix, before and after, each read once."""
        names = [self.matrix.parameter, *([self.matrix.norm.parameter] if self.matrix.norm else [])]
        start, params = ({name: params[name] for name in names} for params in (self.start, self.params))
        return start, params

    @cached_property
    def stored_before(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix at the start."""
        return _single(self.matrix.of(self._read[0]))

    @cached_property
    def stored_after(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix at the checkpoint."""
        return _single(self.matrix.of(self._read[1]))

    @cached_property
    def before(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix at the start, with its gain."""
        return _with_gain(self.stored_before, self.matrix.gain(self._read[0]))

    @cached_property
    def after(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix at the checkpoint, with its gain."""
        return _with_gain(self.stored_after, self.matrix.gain(self._read[1]))

    @cached_property
    def update(self) -> Update:
        """The update between them; of an adapter from its factors."""
        adapted = isinstance(self.params, Adapted) and self.params.base is self.start
        start, params = (self.start, self.params) if adapted else self._read
        return update_of(self.matrix, params, start)

    @cached_property
    def update_squares(self) -> Float[Tensor, " d"]:
        """The eigenvalues of the update's Gram matrix, descending."""
        return eigenvalues(self.update.gram)

    @cached_property
    def parts_before(self) -> Decomposition:
        """The decomposition of the matrix before."""
        return Decomposition.of(self.before)

    @cached_property
    def parts_after(self) -> Decomposition:
        """The decomposition of the matrix after."""
        return Decomposition.of(self.after)

    @cached_property
    def squares_after(self) -> Float[Tensor, " r"]:
        """The squared singular values of the matrix after, descending.

        Not those of `parts_after`, which has other last digits, so that a probe alone has the same rows.
        """
        wide = self.after.double()
        return eigenvalues(wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide)


def _single(matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    return matrix.to("cpu", torch.promote_types(matrix.dtype, torch.float32))


def _with_gain(
    matrix: Float[Tensor, "d_out d_in"], gain: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "d_out d_in"]:
    return matrix if gain is None else gain.cpu()[:, None] * matrix


@dataclass(frozen=True)
class Visit:
    """Sees every pair of a checkpoint, in the order of the matrices, and then, of its inputs, the moments.

    In the end it has the rows.
    """

    pair: Callable[[MatrixPair], None]
    rows: Callable[[], list[Row]]
    inputs: Inputs | None = None
    """The held-out text of the moments that `moment` sees; without, there are none."""
    moment: Callable[[Site, Moment], None] | None = None


@runtime_checkable
class OfPairs(Protocol):
    """A probe whose `measurement` is `alone` of its `visits`, so that several can share one walk."""

    def visits(self, setting: Setting) -> Callable[[Params], Visit]:
        """For each checkpoint a visit, with all that is common to the checkpoints done once."""
        ...


def alone(probe: OfPairs, setting: Setting) -> Callable[[Params], list[Row]]:
    """The measurement of one probe."""
    measure = together({"": probe}, setting)
    return lambda params: measure(params)[""]


def together(probes: Mapping[str, object], setting: Setting) -> Callable[[Params], dict[str, list[Row]]]:
    """The measurement, by name, of those probes that are `OfPairs`: every matrix is read once for all.

    Its decompositions are made once, too, and one pass over a text serves all that take moments of its
    inputs. The rows are those of each probe alone, to the bit.
    """
    by_name = {name: probe.visits(setting) for name, probe in probes.items() if isinstance(probe, OfPairs)}

    def measure(params: Params) -> dict[str, list[Row]]:
        visits = {name: visit(params) for name, visit in by_name.items()}
        for matrix in setting.model.architecture.matrices if visits else ():
            pair = MatrixPair(matrix, setting.start, params)
            for visit in visits.values():
                visit.pair(pair)
        by_text: dict[Inputs, list[Callable[[Site, Moment], None]]] = {}
        for visit in visits.values():
            if visit.inputs is not None and visit.moment is not None:
                by_text.setdefault(visit.inputs, []).append(visit.moment)
        for inputs, seeing in by_text.items():
            for site, moment in input_moments(setting, params, inputs):
                for see in seeing:
                    see(site, moment)
                del moment  # before the next sums are made
        return {name: visit.rows() for name, visit in visits.items()}

    return measure


def each_pair(rows: Callable[[MatrixPair], Iterator[Row]]) -> Visit:
    """A visit whose rows are those of every pair by itself."""
    collected: list[Row] = []
    return Visit(lambda pair: collected.extend(rows(pair)), lambda: collected)
