"""A power law fitted to the upper tail of a spectrum, with its goodness of fit."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

FEWEST = 10  # values of a tail (ours)
TAILS = 32  # tail sizes that are tried at most, evenly spread on a logarithmic scale (ours)
BLOCK = 2**20  # values of samples that are fitted together


@dataclass(frozen=True)
class PowerLaw:
    """A density ∝ x^-exponent of the `tail` largest values, above the next one.

    `distance` is the Kolmogorov-Smirnov distance of these values from the fit, in [0, 1], and `p_value` the
    probability of one as large in samples of the fit; None where none were drawn.
    """

    exponent: float
    tail: int
    distance: float
    p_value: float | None = None


def power_law(values: Float[Tensor, " n"], generator: np.random.Generator, draws: int = 0) -> PowerLaw | None:
    """The power law of the upper tail of positive values; None for fewer than 12, or without any spread.

    With x_1 ≥ x_2 ≥ ..., the exponent is 1 + m / Σ_{i ≤ m} ln(x_i / x_{m+1}), one more than Hill's (1975)
    estimate of the tail index, Ann. Stat. 3:1163. The tail m is the one whose distance is smallest, of at
    least 10 values. The p-value is from `draws` samples of n values, each one in the tail with probability
    m/n, from the fit, and else one of the values below, every sample fitted anew. It takes the values to be
    independent. Source: Clauset, Shalizi & Newman (2009), SIAM Rev. 51:661, sections 3.3 and 4.1.
    """
    logs = values.double().log().sort(descending=True).values.cpu().numpy()
    n = len(logs)
    if n < FEWEST + 2 or logs[0] == logs[-1]:
        return None
    exponents, tails, distances = _fits(logs[None])
    exponent, tail, distance = float(exponents[0]), int(tails[0]), float(distances[0])
    if not draws:
        return PowerLaw(exponent, tail, distance)
    exceeding, block = 0, max(1, BLOCK // n)
    for first in range(0, draws, block):
        shape = (min(block, draws - first), n)
        upper = logs[tail] + generator.exponential(1 / (exponent - 1), shape)
        lower = generator.choice(logs[tail:], shape)
        sampled = np.where(generator.random(shape) < tail / n, upper, lower)
        exceeding += int((_fits(-np.sort(-sampled, axis=1))[2] >= distance).sum())
    return PowerLaw(exponent, tail, distance, (1 + exceeding) / (1 + draws))


def _fits(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponent, tail and distance of every line of logarithms in descending order."""
    n = logs.shape[1]
    sums = logs.cumsum(1)
    best = np.full(len(logs), np.inf)
    exponents, tails = np.ones(len(logs)), np.full(len(logs), FEWEST)
    for m in np.unique(np.geomspace(FEWEST, n - 1, TAILS).astype(int)):
        excess = sums[:, m - 1] - m * logs[:, m]  # Σ ln(x_i / x_{m+1})
        rate = m / np.where(excess > 0, excess, np.inf)
        # The share of the fit above each value is (x / x_{m+1})^-rate, that of the tail steps at i/m.
        above = np.exp(-rate[:, None] * (logs[:, :m] - logs[:, m : m + 1]))
        steps = np.arange(1, m + 1) / m
        distance = np.maximum(steps - above, above - (steps - 1 / m)).max(1)
        better = (distance < best) & (excess > 0)
        best, tails = np.where(better, distance, best), np.where(better, m, tails)
        exponents = np.where(better, 1 + rate, exponents)
    return exponents, tails, best


def gaussian_spectra(small: int, large: int, draws: int, seed: int) -> Float[Tensor, "draws small"]:
    """Squared singular values, descending, of `draws` matrices of iid standard Gaussian entries.

    They are the eigenvalues of B Bᵀ with B bidiagonal: on its diagonal independent χ of large, large - 1, ...
    degrees of freedom, below it of small - 1, ..., 1. Source: Dumitriu & Edelman (2002), J. Math. Phys.
    43:5830, with β = 1.
    """
    from scipy.linalg import eigh_tridiagonal

    generator = np.random.default_rng([seed, small, large])
    on = generator.chisquare(large - np.arange(small), (draws, small))
    below = generator.chisquare(small - 1 - np.arange(small - 1), (draws, small - 1))
    diagonal = on + np.pad(below, ((0, 0), (1, 0)))
    beside = np.sqrt(below * on[:, :-1])
    values = [
        eigh_tridiagonal(*lines, eigvals_only=True, lapack_driver="sterf")
        for lines in zip(diagonal, beside, strict=True)
    ]
    return torch.from_numpy(np.stack(values)[:, ::-1].copy()).clamp(min=0)
