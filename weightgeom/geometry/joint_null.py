"""The rotation null of a mean over several matrices: all of their updates are rotated together."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.subspace import Subspace

SKETCH = 256  # random directions a side; a d up to this many is compared without error


@dataclass(frozen=True, eq=False)
class Sketch:
    """A symmetric matrix without trace, by its Frobenius norm and its products with random vectors."""

    products: Float[Tensor, "r r"]
    norm: float


class Sketches:
    """Makes sketches of d x d matrices whose inner products estimate those of the matrices.

    With Gaussian G and H of r columns, E<Gᵀ A H, Gᵀ B H> = r² <A, B>. Up to d = 256 the sketch is the matrix
    itself. Source: ours.
    """

    def __init__(self, d: int, seed: int) -> None:
        self.d, self.sides = d, None
        if d > SKETCH:
            generator = torch.Generator().manual_seed(seed)
            self.sides = torch.randn(2, d, SKETCH, generator=generator) / sqrt(SKETCH)

    @property
    def exact(self) -> bool:
        """Whether inner products have no error."""
        return self.sides is None

    def of_gram(self, gram: Float[Tensor, "d d"]) -> Sketch:
        """Of G / tr G - I / d."""
        trace = float(gram.diagonal().double().sum())
        norm = sqrt(max(0.0, (float(torch.linalg.matrix_norm(gram)) / trace) ** 2 - 1 / self.d))
        if self.sides is None:
            return Sketch(gram.float() / trace - torch.eye(self.d) / self.d, norm)
        left, right = self.sides
        return Sketch(left.T @ (gram.float() @ right) / trace - left.T @ right / self.d, norm)

    def of_space(self, space: Subspace, k: int | None = None) -> Sketch:
        """Of U Uᵀ - (r/d) I, with r the subspace's dimension, times k/r where its ratio is over d/r."""
        basis, r = space.basis.float(), space.basis.shape[1]
        scale = 1.0 if k is None else k / r
        norm = scale * sqrt(r * (1 - r / self.d))
        if self.sides is None:
            return Sketch(scale * (basis @ basis.T - torch.eye(self.d) * (r / self.d)), norm)
        left, right = self.sides
        return Sketch(scale * ((left.T @ basis) @ (basis.T @ right) - left.T @ right * (r / self.d)), norm)


@dataclass(frozen=True)
class Spread:
    """Standard deviation of a mean ratio under the joint null, and the error of its estimate by sketches."""

    sd: float
    stderr: float | None

    @classmethod
    def of(cls, grams: Sequence[Sketch], spaces: Sequence[Sketch], sketches: Sketches, k: int) -> "Spread":
        """Of the mean of m ratios: matrix i has the Gram matrix `grams[i]` and the subspace `spaces[i]`.

        One Haar rotation turns all updates at once, so that matrices which share directions, or a subspace,
        vary together. With M_i and P_i the matrices that the sketches are of,

            Var = (d/k)² / m² · 2 / ((d - 1)(d + 2)) · Σ_ij <M_i, M_j> <P_i, P_j>,

        of which independence of the matrices keeps the terms i = j alone. Source: ours; exact, as the
        second moments of a Haar rotation are.
        """
        d, m = sketches.d, len(grams)
        scale = (d / k / m) ** 2 * 2 / ((d - 1) * (d + 2))

        def total(columns: slice) -> float:
            return float((_inner(grams, columns) * _inner(spaces, columns)).sum())

        whole = max(0.0, total(slice(None)))
        sd = sqrt(scale * whole)
        if sketches.exact or whole == 0:
            return cls(sd, None)
        half = SKETCH // 2
        error = abs(total(slice(half)) - total(slice(half, None))) / 2
        return cls(sd, sd * error / (2 * whole))


def _inner(sketches: Sequence[Sketch], columns: slice) -> Float[Tensor, "m m"]:
    """Inner products of the matrices: estimated cosines times the norms, which are known."""
    flat = torch.stack([sketch.products[:, columns].flatten() for sketch in sketches])
    lengths = flat.norm(dim=1).clamp(min=torch.finfo(flat.dtype).tiny)
    norms = torch.tensor([sketch.norm for sketch in sketches], dtype=torch.float64)
    cosines = (flat @ flat.T).double() / lengths.outer(lengths)
    return cosines * norms.outer(norms)
