"""Null distributions of the subspace fraction: what a concentrated update must beat."""

from dataclasses import dataclass
from math import inf, sqrt

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Null:
    """Distribution of a fraction under chance: the Beta with this mean and standard deviation."""

    mean: float
    sd: float

    def z(self, fraction: float) -> float:
        """Standard deviations by which `fraction` exceeds the null's mean; 0 where the null has no spread."""
        return (fraction - self.mean) / self.sd if self.sd > 0 else 0.0

    def p_value(self, fraction: float) -> float:
        """One-sided p-value: the null's probability of a fraction at least this large."""
        from scipy import stats  # noqa: PLC0415 (slow to import, and `--help` must not wait for it)

        if self.sd == 0:
            return 1.0
        a, b = self.shape()
        if a + b > 1e12:  # normal by then; scipy's Beta is NaN at about 1e16
            return float(stats.norm.sf(self.z(fraction)))
        return float(stats.beta.sf(fraction, a, b))

    def shape(self) -> tuple[float, float]:
        """The Beta's two shape parameters, by moments; (inf, inf) where the null has no spread."""
        if self.sd == 0:
            return inf, inf
        concentration = self.mean * (1 - self.mean) / self.sd**2 - 1
        return self.mean * concentration, (1 - self.mean) * concentration


def isotropic_null(d: int, k: int, n: int) -> Null:
    """Null of a d x n matrix of iid Gaussian entries: exactly Beta(k n / 2, (d - k) n / 2).

    `d` is the dimension of the space that holds the k-dimensional subspace, `n` the other one.
    Source: the squared norms inside and outside are independent chi-squares with k n and (d - k) n degrees.
    """
    mean = k / d
    return Null(mean, sqrt(mean * (1 - mean) / (d * n / 2 + 1)))


def rotation_null(x: Float[Tensor, "n d"], k: int) -> Null:
    """Null that keeps the singular values of `x` and rotates its right singular vectors by a Haar rotation.

    With p_i the shares of the squared singular values, the fraction is Σ p_i X_i, X_i the squared length of
    the i-th rotated vector inside the subspace. Every X_i is Beta(k/2, (d-k)/2) with variance
    s² = 2k(d-k) / (d²(d+2)), and Σ_i X_i = k over a full basis makes cov(X_i, X_j) = -s²/(d-1), so

        mean = k/d        var = s² (d Σp² - 1) / (d - 1),

    both exact. The shape is exact at rank one and a Beta matched by moments otherwise: close where the
    spectrum decays, wrong in the tails where all singular values but one are equal. Source: ours.

    Raises:
        ValueError: if `x` is all zero.
    """
    d = x.shape[1]
    x = x.double()
    gram = x @ x.T if x.shape[0] <= d else x.T @ x
    total = gram.trace()
    if total == 0:
        raise ValueError("an all-zero matrix has no singular directions to rotate")
    concentration = float(gram.square().sum() / total**2)  # Σp², one over the participation ratio
    single = 2 * k * (d - k) / (d**2 * (d + 2))
    return Null(k / d, sqrt(max(0.0, single * (d * concentration - 1) / (d - 1))) if d > 1 else 0.0)
