"""Bootstrap over groups of prompts: the variation of an estimate with the sampled text."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


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


def bootstrap_interval(value: float, resampled: Sequence[float], groups: int) -> Interval | None:
    """Interval of an estimate from its bootstrap samples; None for fewer than two samples.

    The standard error is the samples' standard deviation times √(g / (g - 1)), because the bootstrap
    variance of a mean over g groups is (g - 1)/g of the unbiased one. The samples are biased relative to the
    estimate as the estimate is relative to the truth (an estimated subspace captures too little), so the
    interval is 2 value - mean(samples) ± t · stderr, with Student's t of g - 1 degrees of freedom.
    Source: Efron & Tibshirani (1993), An Introduction to the Bootstrap, 10.2 and 12.2; the correction for
    few groups is ours.
    """
    from scipy import stats

    if len(resampled) < 2:
        return None
    samples = torch.tensor(resampled, dtype=torch.float64)
    stderr = float(samples.std()) * sqrt(groups / (groups - 1))
    centre = 2 * value - float(samples.mean())
    reach = float(stats.t.ppf(0.975, groups - 1)) * stderr
    return Interval(stderr, centre - reach, centre + reach)
