"""The turn that an update gives to a matrix's own singular directions, and the directions that it adds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import ProbeDeclaration
from weightgeom.geometry.nulls import rotated
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture, ResidualMatrix
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
            ours.

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
    draws: int = Field(default=9, ge=2)  # of each null: as many decompositions

    def check(self, architecture: Architecture) -> None:
        """Raise ValueError if k exceeds the width of the stream."""
        if self.k is not None and not 1 <= self.k <= architecture.d_model:
            raise ValueError(
                f"probe.rotation.k must be 1 to {architecture.d_model}, the width of the residual stream, got"
                f" {self.k}"
            )

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint's update since the trajectory's start."""

        def measure(params: Params) -> list[Row]:
            generator = torch.Generator().manual_seed(setting.seed)
            return [
                row
                for matrix in setting.model.architecture.matrices
                for row in self._rows(matrix, setting.start, params, generator)
            ]

        return measure

    def _rows(
        self, matrix: ResidualMatrix, start: Params, params: Params, generator: torch.Generator
    ) -> Iterator[Row]:
        before, after = (matrix.written(weights).double().cpu() for weights in (start, params))
        if torch.equal(before, after):
            return
        update = after - before
        k = min(self.k or max(1, min(before.shape) // 8), min(before.shape))
        place, n = matrix.table_columns, before.numel()
        start_parts = Decomposition.of(before)
        compared = self._compared(start_parts, Decomposition.of(after), k)
        for side, angles in (("left", compared.left), ("right", compared.right)):
            for index, cosine in enumerate(angles[: self.curve].cos().tolist(), 1):
                yield row(f"{side}_cosine", cosine, n=n, **place, k=index)
        for name, value in compared.numbers.items():
            yield row(name, value, n=n, unit=UNITS.get(name, "1"), **place, k=k)
        for null, draw in (("null", rotated), ("noise", noise)):
            drawn = [
                self._compared(start_parts, Decomposition.of(before + draw(update, generator)), k).numbers
                for _ in range(self.draws)
            ]
            for name in compared.numbers:
                values = torch.tensor([numbers[name] for numbers in drawn], dtype=torch.float64)
                at = {"n": self.draws, "unit": UNITS.get(name, "1"), **place, "k": k}
                yield row(f"{null}_{name}_mean", float(values.mean()), **at)
                yield row(f"{null}_{name}_sd", float(values.std()), **at)

    def _compared(self, before: "Decomposition", after: "Decomposition", k: int) -> "Comparison":
        left = _angles(before.left[:, :k], after.left[:, :k])
        right = _angles(before.right[:, :k], after.right[:, :k])
        nearest = (before.left.T @ after.left[:, : self.leading]).abs().amax(0)
        shift = (after.values - before.values).norm() / before.values.norm()
        numbers = {
            "left_angle": float(left.rad2deg().mean()),
            "right_angle": float(right.rad2deg().mean()),
            "spectral_shift": float(shift),
            "intruders": float((nearest < self.similarity).sum()),
        }
        return Comparison(left, right, numbers)


@plain_dataclass(frozen=True, eq=False)
class Decomposition:
    """W = L diag(values) Rᵀ."""

    left: Float[Tensor, "d_out r"]
    values: Float[Tensor, " r"]
    right: Float[Tensor, "d_in r"]

    @classmethod
    def of(cls, matrix: Float[Tensor, "d_out d_in"]) -> "Decomposition":
        """The decomposition of a matrix, strongest direction first."""
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return cls(left, values, right.T)


@plain_dataclass(frozen=True, eq=False)
class Comparison:
    """Principal angles of either side in ascending order, in radians, and the numbers that have nulls."""

    left: Float[Tensor, " k"]
    right: Float[Tensor, " k"]
    numbers: Mapping[str, float]


def noise(update: Float[Tensor, "d_out d_in"], generator: torch.Generator) -> Float[Tensor, "d_out d_in"]:
    """A matrix of iid Gaussian entries with the norm of dW."""
    drawn = torch.randn(update.shape, generator=generator, dtype=update.dtype)
    return drawn * (update.norm() / drawn.norm())


def _angles(basis: Float[Tensor, "d k"], other_basis: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    from scipy.linalg import subspace_angles

    return torch.from_numpy(subspace_angles(basis.numpy(), other_basis.numpy()).copy()).flip(0)
