"""Alignment of two updates of the same matrices, with its nulls under random rotations."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.nulls import null_ratio_sd

ENERGY = 0.95  # share of an update's energy that its leading directions hold
ROUNDING = 1e-5  # of the largest singular value: smaller ones are rounding
NULLS = ("cosine", "alignment_ratio", "mode_overlap")  # quantities with a null of their own


@dataclass(frozen=True, eq=False)
class Leading:
    """An update of one matrix with its leading singular vectors.

    `concentration` is Σp², p the share of each singular direction in its energy.
    """

    update: Float[Tensor, "d_out d_in"]
    left: Float[Tensor, "d_out k"]
    right: Float[Tensor, "d_in k"]
    concentration: float

    @property
    def energy(self) -> float:
        """‖dW‖²_F, in the units of the weights squared."""
        return float(self.update.double().square().sum())


def leading(update: Float[Tensor, "d_out d_in"], energy: float = ENERGY) -> Leading | None:
    """The update with the fewest singular vectors that hold a share of its energy; None where it is zero."""
    if not bool(update.any()):
        return None
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    shares = values.square() / values.square().sum()
    k = min(int((shares.cumsum(0) < energy * (1 - 1e-12)).sum()) + 1, len(shares))
    return Leading(update, left[:, :k], right[:k].T, float(shares.square().sum()))


@dataclass(frozen=True)
class Aligned:
    """The numbers of two updates A and B of one matrix from which all quantities follow.

    `inside` is the share of ‖A‖² inside the leading left singular vectors of B, of which there are k of d.
    `overlap` is that of the right singular vectors.
    """

    inner: float
    energies: tuple[float, float]
    entries: int
    inside: float
    inside_mean: float
    inside_variance: float
    overlap: float
    overlap_mean: float
    overlap_sd: float


def aligned(a: Leading, b: Leading) -> Aligned:
    """The alignment of A with B: how they point, and how much of A lies in B's leading directions."""
    d, k = b.left.shape
    mean = k / d
    # The rotation null of a share (`weightgeom.geometry.nulls.rotation_null`), with Σp² of A's left side.
    single = 2 * k * (d - k) / (d**2 * (d + 2))
    variance = single * max(0.0, d * a.concentration - 1) / (d - 1) if d > 1 else 0.0
    share = (b.left.T @ a.update.double()).square().sum() / a.update.double().square().sum()
    return Aligned(
        float((a.update.double() * b.update.double()).sum()),
        (a.energy, b.energy),
        a.update.numel(),
        float(share),
        mean,
        variance,
        *overlap(a.right, b.right),
    )


def overlap(basis: Float[Tensor, "d k"], other_basis: Float[Tensor, "d l"]) -> tuple[float, float, float]:
    """‖Uᵀ V‖²_F / min(k, l), in [0, 1], with its mean max(k, l) / d and its sd if either is Haar-uniform."""
    d, k, other_k = len(basis), basis.shape[1], other_basis.shape[1]
    mean = max(k, other_k) / d
    value = float((basis.T @ other_basis).square().sum()) / min(k, other_k)
    return min(1.0, value), mean, mean * null_ratio_sd(d, k, other_k)


def top_right(update: Float[Tensor, "d_out d_in"], k: int) -> Float[Tensor, "d_in _"] | None:
    """The k leading right singular vectors, or those above rounding; None where the update is zero."""
    if not bool(update.any()):
        return None
    _, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    return right[: min(k, int((values > ROUNDING * values[0]).sum()))].T


def pooled(parts: Sequence[Aligned]) -> dict[str, float]:
    """The quantities of A and B over one matrix or several, each matrix rotated by itself under the null.

    Quantities, all of unit 1:
        cosine: <A, B> / (‖A‖ ‖B‖) over all entries, in [-1, 1]. arXiv:2212.04089. Under A R_out B R_in with
            Haar rotations its mean is 0 and its variance Σ ‖A‖² ‖B‖² / entries / (Σ‖A‖² Σ‖B‖²), exact.
        orthogonal_share: ‖A - proj_B A‖ / ‖A‖ = √(1 - cosine²), in [0, 1]. arXiv:2606.23740.
        alignment_ratio: ‖P A‖ / ‖A‖, P onto the leading left singular vectors of B, in [0, 1].
            arXiv:2502.04959. The mean and variance of its square are exact, those of the ratio are of the
            Beta distribution with both, which is exact for one matrix of rank one.
        mode_overlap: ‖V_Aᵀ V_B‖²_F / min(k_A, k_B), the mean over matrices, in [0, 1]. arXiv:2505.14185. Its
            mean max(k_A, k_B) / d and its variance are exact.
        null_..._mean, null_..._sd: of the cosine, the alignment ratio and the mode overlap. Source: ours.
    """
    first = sum(part.energies[0] for part in parts)
    norms = sqrt(first * sum(part.energies[1] for part in parts))
    cosine = max(-1.0, min(1.0, sum(part.inner for part in parts) / norms))
    spread = sqrt(sum(part.energies[0] * part.energies[1] / part.entries for part in parts)) / norms
    weights = [part.energies[0] / first for part in parts]
    inside = sum(weight * part.inside for weight, part in zip(weights, parts, strict=True))
    mean, sd = _root(
        sum(weight * part.inside_mean for weight, part in zip(weights, parts, strict=True)),
        sum(weight**2 * part.inside_variance for weight, part in zip(weights, parts, strict=True)),
    )
    n = len(parts)
    return {
        "cosine": cosine,
        "null_cosine_mean": 0.0,
        "null_cosine_sd": spread,
        "orthogonal_share": sqrt(1 - cosine**2),
        "alignment_ratio": sqrt(min(1.0, inside)),
        "null_alignment_ratio_mean": mean,
        "null_alignment_ratio_sd": sd,
        "mode_overlap": sum(part.overlap for part in parts) / n,
        "null_mode_overlap_mean": sum(part.overlap_mean for part in parts) / n,
        "null_mode_overlap_sd": sqrt(sum(part.overlap_sd**2 for part in parts)) / n,
    }


def _root(mean: float, variance: float) -> tuple[float, float]:
    """Mean and standard deviation of √X, with X Beta of this mean and variance."""
    if variance <= 0 or mean >= 1:
        return sqrt(mean), 0.0
    concentration = mean * (1 - mean) / variance - 1
    if concentration > 1e6:  # to first order, as differences of lgamma lose their digits
        return sqrt(mean) * (1 - variance / (8 * mean**2)), sqrt(variance / mean) / 2
    a = mean * concentration
    root = exp(lgamma(a + 0.5) - lgamma(a) + lgamma(concentration) - lgamma(concentration + 0.5))
    return root, sqrt(max(0.0, mean - root**2))
