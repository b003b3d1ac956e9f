"""The turn that an update gives to a matrix's own singular directions, and the directions that it adds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import ProbeDeclaration
from weightgeom.estimators.pairs import Decomposition, MatrixPair, Visit, alone, each_pair
from weightgeom.geometry.subspace import leading_eigenpairs
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.table import Row, row

UNITS = {"left_angle": "degree", "right_angle": "degree", "intruders": "count"}


@dataclass(frozen=True)
class Rotation:
    """Top-k singular directions of W₀ and of W₁ = W₀ + dW, compared on either side, and their spectra.

    Quantities:
        left_cosine, right_cosine: cos θ_i = σ_i(U₀ᵀ U₁) of the left and of the right singular vectors, the
            column `k` being i, for the first `curve`; in [0, 1]. arXiv:2511.08567.
        left_angle, right_angle: the mean of the k angles θ_i; degrees, in [0, 90].
        spectral_shift: ‖σ(W₁) - σ(W₀)‖ / ‖σ(W₀)‖ over all singular values; of unit 1. arXiv:2511.08567.
        intruders: the number of the first `leading` left singular vectors of W₁ with |cos| < `similarity` to
            each one of W₀; a count. arXiv:2410.21228.
        null_..._mean, null_..._sd: under updates of equal spectrum with random singular vectors, A dW Bᵀ with
            Haar rotations A and B.
        noise_..._mean, noise_..._sd: under iid Gaussian updates of equal norm. Both nulls: `draws` samples,
            ours. Matrices of one shape share them, so that their errors are correlated.

    A matrix that has not moved has no rows.
    """

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration(
        "left_angle", label="mean angle, left (°)", divisible=True
    )

    k: int | None = None  # null: d/8, with d the smaller side
    curve: int = Field(default=16, ge=0)  # angles that have rows of their own
    leading: int = Field(default=10, ge=1)  # singular vectors that may be intruders
    similarity: float = Field(
        default=0.5, gt=0, lt=1
    )  # below it, to all earlier ones, a vector is an intruder
    draws: int = Field(default=5, ge=2)  # of each null: as many decompositions

    def check(self, architecture: Architecture) -> None:
        """Raise ValueError if k exceeds the width of the stream."""
        if self.k is not None and not 1 <= self.k <= architecture.d_model:
            raise ValueError(
                f"probe.rotation.k must be 1 to {architecture.d_model}, the width of the residual stream, got"
                f" {self.k}"
            )

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint's update since the trajectory's start."""
        return alone(self, setting)

    def visits(self, setting: Setting) -> Callable[[Params], Visit]:
        """The same, for a walk with others."""
        return lambda params: each_pair(lambda pair: self._rows(pair, setting.seed))

    def _rows(self, pair: MatrixPair, seed: int) -> Iterator[Row]:
        if torch.equal(pair.before, pair.after):
            return
        shape = pair.before.shape
        k = min(self.k or max(1, min(shape) // 8), min(shape))
        place, n = pair.matrix.table_columns, pair.before.numel()
        compared = self.compared(pair.parts_before, pair.parts_after, k)
        for side, angles in (("left", compared.left), ("right", compared.right)):
            for index, cosine in enumerate(angles[: self.curve].cos().tolist(), 1):
                yield row(f"{side}_cosine", cosine, n=n, **place, k=index)
        for name, value in compared.numbers.items():
            yield row(name, value, n=n, unit=UNITS.get(name, "1"), **place, k=k)
        spectrum = pair.update_squares[: min(shape)].clamp(min=0).sqrt()
        for null, draw in (("null", rotated), ("noise", noise)):
            drawn = [
                self.drawn(pair.parts_before, draw(spectrum, max(shape), seed, index), k).numbers
                for index in range(self.draws)
            ]
            for name in compared.numbers:
                values = torch.tensor([numbers[name] for numbers in drawn], dtype=torch.float64)
                at = {"n": self.draws, "unit": UNITS.get(name, "1"), **place, "k": k}
                yield row(f"{null}_{name}_mean", float(values.mean()), **at)
                yield row(f"{null}_{name}_sd", float(values.std()), **at)

    def compared(self, before: Decomposition, after: Decomposition, k: int) -> "Comparison":
        """The directions and the spectra of two matrices."""
        most = max(k, self.leading)
        left, right = before.left.T @ after.left[:, :most], before.right.T @ after.right[:, :most]
        return self._numbers(before.values, after.values, left, right, k)

    def drawn(self, before: Decomposition, update: "Drawn", k: int) -> "Comparison":
        """The comparison with W₀ + E, from its coordinates in the singular vectors of W₀ alone.

        With W₀ = L S Rᵀ, the wider side right, E₁ = Lᵀ E R and F = Lᵀ E Eᵀ L, the Gram matrix of W₀ + E is
        S² + S E₁ᵀ + E₁ S + F in the basis L; its eigenvectors Y are the left singular vectors, and
        (S + E₁)ᵀ Y / σ is the part of the right ones inside R.
        """
        s = before.values
        turned = s[:, None] * update.inside.T
        gram = update.gram + turned + turned.T
        gram.diagonal().add_(s.square())
        squares, short = leading_eigenpairs(gram, min(max(k, self.leading), len(s)))
        values = squares.clamp(min=0).sqrt()
        lengths = values[: short.shape[1]]
        # A direction without length is none: it lies along no direction of before.
        scale = torch.where(lengths > 1e-6 * values[0], 1 / lengths, 0.0)
        long = (s[:, None] * short + update.inside.T @ short) * scale
        wide = len(before.left) <= len(before.right)
        left, right = (short, long) if wide else (long, short)
        return self._numbers(s, values, left, right, k)

    def _numbers(
        self,
        before: Float[Tensor, " r"],
        after: Float[Tensor, " r"],
        left: Float[Tensor, "r most"],
        right: Float[Tensor, "r most"],
        k: int,
    ) -> "Comparison":
        """From both spectra, and the cosines of the leading directions of after with all of before."""
        angles = [torch.linalg.svdvals(side[:k, :k]).clamp(max=1).arccos() for side in (left, right)]
        nearest = left[:, : self.leading].abs().amax(0)
        numbers = {
            "left_angle": float(angles[0].rad2deg().mean()),
            "right_angle": float(angles[1].rad2deg().mean()),
            "spectral_shift": float((after - before).norm() / before.norm()),
            "intruders": float((nearest < self.similarity).sum()),
        }
        return Comparison(angles[0], angles[1], numbers)


@plain_dataclass(frozen=True, eq=False)
class Comparison:
    """Principal angles of either side in ascending order, in radians, and the numbers that have nulls."""

    left: Float[Tensor, " k"]
    right: Float[Tensor, " k"]
    numbers: Mapping[str, float]


@plain_dataclass(frozen=True, eq=False)
class Drawn:
    """A random m x n update E, m ≤ n, whose law no rotation changes: its first m columns, and E Eᵀ."""

    inside: Float[Tensor, "m m"]
    gram: Float[Tensor, "m m"]


def rotated(spectrum: Float[Tensor, " m"], n: int, seed: int, draw: int) -> Drawn:
    """An update with these singular values and Haar-uniform singular vectors."""
    left, right, _, _ = _draw(len(spectrum), n, seed, draw)
    scaled = left.double() * spectrum
    return Drawn(scaled @ right.double().T, scaled @ scaled.T)


def noise(spectrum: Float[Tensor, " m"], n: int, seed: int, draw: int) -> Drawn:
    """An update of iid Gaussian entries with the norm of these singular values."""
    _, _, inside, gram = _draw(len(spectrum), n, seed, draw)
    norm = float(spectrum.norm())
    return Drawn(inside.double() * norm, gram.double() * norm**2)


KEPT = 768  # sides up to which draws are kept, in up to 10 MB each


def _draw(m: int, n: int, seed: int, draw: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Haar L (m x m); the first m rows of a Haar frame (n x m); a Gaussian m x n of norm 1, as `Drawn`."""
    return (_kept if m <= KEPT else _made)(m, n, seed, draw)


def _made(m: int, n: int, seed: int, draw: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    gaussian = torch.randn(m, n, generator=generator, dtype=torch.float64)
    gaussian /= gaussian.norm()
    parts = _frame(m, m, generator), _frame(n, m, generator), gaussian[:, :m], gaussian @ gaussian.T
    left, right, inside, gram = (part.float() for part in parts)
    return left, right, inside, gram


_kept = lru_cache(maxsize=36)(_made)


def _frame(n: int, m: int, generator: torch.Generator) -> Float[Tensor, "m m"]:
    """The first m rows of a Haar-uniform orthonormal n x m frame."""
    gaussian = torch.randn(n, m, generator=generator, dtype=torch.float64)
    if n == m:
        factors = torch.linalg.qr(gaussian)
        return factors.Q * factors.R.diagonal().sign()
    factor = torch.linalg.cholesky(gaussian.T @ gaussian)  # gaussian = frame @ factorᵀ
    return torch.linalg.solve_triangular(factor, gaussian[:m].T, upper=False).T
