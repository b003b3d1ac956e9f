"""Bootstrap over groups of prompts: the variation of an estimate with the sampled text."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FEW_TOKENS = 16  # per dimension, below which intervals are widened


class Interval(NamedTuple):
    """Standard error of an estimate and its 95 % interval, in the estimate's unit."""

    stderr: float
    low: float
    high: float


def bootstrap_times(groups: int, resamples: int, seed: int) -> Float[Tensor, "resample group"]:
    """Number of times each group occurs in each bootstrap sample; no samples for fewer than two groups."""
    if groups < 2:
        return torch.zeros(0, groups)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(groups, (resamples, groups), generator=generator)
    return torch.zeros(resamples, groups).scatter_add_(1, drawn, torch.ones(resamples, groups))


def widening(per_dimension: float) -> float:
    """The factor of errors that are estimated from few tokens: √(16 / tokens per dimension), at least 1."""
    return sqrt(max(1.0, FEW_TOKENS / per_dimension))


def bootstrap_interval(
    value: float, resampled: Sequence[float], groups: int, per_dimension: float = float("inf")
) -> Interval | None:
    """Interval of an estimate from its bootstrap samples; None for fewer than two samples.

    The standard error is the samples' standard deviation times √(g / (g - 1)), because the bootstrap
    variance of a mean over g groups is (g - 1)/g of the unbiased one. The samples are biased relative to the
    estimate as the estimate is relative to the truth (an estimated subspace captures too little), so the
    interval is 2 value - mean(samples) ± t · stderr, with Student's t of g - 1 degrees of freedom.
    With fewer than 16 tokens `per_dimension` behind an estimated subspace, its error is no longer that of a
    linear estimate and the interval covers too little (61 % at one); its half-width is then multiplied by
    16 / tokens per dimension.
    Source: Efron & Tibshirani (1993), An Introduction to the Bootstrap, 10.2 and 12.2; the corrections for
    few groups and few tokens are ours.
    """
    from scipy import stats

    if len(resampled) < 2:
        return None
    samples = torch.tensor(resampled, dtype=torch.float64)
    stderr = float(samples.std()) * sqrt(groups / (groups - 1))
    centre = 2 * value - float(samples.mean())
    reach = float(stats.t.ppf(0.975, groups - 1)) * stderr * widening(per_dimension) ** 2
    return Interval(stderr, centre - reach, centre + reach)
