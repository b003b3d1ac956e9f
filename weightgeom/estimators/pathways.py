"""Mean ratios over the matrices of a pathway or of one kind, against one rotation of all their updates."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.estimators.reference_subspaces import Frame, Place
from weightgeom.geometry.gram import EXACT
from weightgeom.geometry.joint_null import Sketch, Sketches, Spread
from weightgeom.geometry.nulls import Null, rotation_null, spectrum_shares
from weightgeom.models.residual import ResidualMatrix
from weightgeom.table import Row, row

Group = tuple[str, str]
"""A pathway and a kind of matrix, "" for all of them."""


class Pathways:
    """Collects the updates of a checkpoint, one after the other.

    Of writes it keeps a d x d matrix for each kind (fp32 above d = 256), as one subspace serves them, which
    makes their null exact. Of reads it keeps sketches. `gram` is of the update on the residual stream's side.
    """

    def __init__(self, dimensions: Sequence[int], d: int, seed: int) -> None:
        self.dimensions, self.d, self.seed = dimensions, d, seed
        self._sketches = Sketches(d, seed)
        self._grams: dict[Group, list[Sketch]] = {}
        self._places: dict[Group, list[Place]] = {}
        self._spaces: dict[tuple[Place, int], Sketch] = {}
        self._sums: dict[str, Float[Tensor, "d d"]] = {}  # by the kind of matrix

    def add(self, matrix: ResidualMatrix, gram: Float[Tensor, "d d"], frame: Frame) -> None:
        """Take the update of a matrix, which is not zero, by its Gram matrix."""
        gram, groups = gram.cpu(), [(matrix.role, matrix.kind), (matrix.role, "")]
        for group in groups:
            self._places.setdefault(group, []).append(frame.place)
        if matrix.role == "write":
            share = gram.to(torch.float64 if self.d <= EXACT else torch.float32)
            share = share / gram.diagonal().double().sum().to(share)
            self._sums[matrix.kind] = (
                self._sums[matrix.kind].add_(share) if matrix.kind in self._sums else share
            )
            return
        sketch = self._sketches.of_gram(gram)
        for group in groups:
            self._grams.setdefault(group, []).append(sketch)
        for k in self.dimensions:
            if (frame.place, k) not in self._spaces:
                space = frame.space.first(frame.directions(k))
                self._spaces[frame.place, k] = self._sketches.of_space(space, k)

    def rows(self, ratios: Iterable[Row]) -> Iterator[Row]:
        """The mean over each group of `ratios`, rows of its matrices, with the null of that mean (no unit).

        Source: ours (`Spread.of`).
        """
        values: dict[tuple[Group, int], list[float]] = {}
        for ratio in ratios:
            for kind in (ratio["matrix"], ""):
                values.setdefault(((ratio["role"], kind), ratio["k"]), []).append(ratio["value"])
        for group, places in self._places.items():
            role, kind = group
            subspaces = {place[0] for place in places}
            spectrum = self._written(kind) if role == "write" else None
            for k in self.dimensions:
                mean = sum(values[group, k]) / len(places)
                at = {"layer": None, "matrix": kind, "expert": None, "role": role, "k": k, "n": len(places)}
                at["subspace"] = min(subspaces) if len(subspaces) == 1 else ""
                yield row("ratio_mean", mean, **at)
                null = None
                if spectrum is not None:
                    null = rotation_null(spectrum, k, self.seed)
                    spread = Spread(null.sd * self.d / k, None)
                else:
                    spaces = [self._spaces[place, k] for place in places]
                    spread = Spread.of(self._grams[group], spaces, self._sketches, k)
                yield row("ratio_mean_null_sd", spread.sd, stderr=spread.stderr, **at)
                yield from _against(mean, spread, null, k / self.d, at)

    def _written(self, kind: str) -> Float[Tensor, " d"]:
        """The spectrum of the sum over all writes, or over those of a kind."""
        if kind:
            return spectrum_shares(self._sums[kind])
        first, *others = self._sums.values()
        total = first.clone()
        for gram in others:
            total += gram
        return spectrum_shares(total)


def _against(mean: float, spread: Spread, null: Null | None, share: float, at: Row) -> Iterator[Row]:
    if spread.sd > 0:
        yield row("ratio_mean_z", (mean - 1) / spread.sd, **at)
    if null is not None:
        p, error = null.p_value(mean * share)
        yield row("ratio_mean_p_value", p, stderr=error, **at)
