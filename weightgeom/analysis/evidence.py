"""Tests over trainings: directions, equivalences, correlations over runs, and Holm's correction."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import atanh, factorial, isfinite, log, sqrt, tanh
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

EXACT = 8  # objectives up to which all orders are counted
ORDERS = 9999  # drawn beyond


@dataclass(frozen=True)
class Evidence:
    """A number with its 95 % interval over n trainings, and the p-values for and against a claim."""

    value: float
    low: float
    high: float
    n: int
    p_for: float
    p_against: float


def direction(values: Sequence[float], bound: float = 0.0, below: bool = False) -> Evidence | None:
    """Student's t test that the mean of values, one for each training, lies above `bound` (or below it).

    p-values are two-sided: 2 P(T ≥ t) for the claim, and 2 P(T ≤ t) against it. None without two values that
    differ.
    """
    made = _t(values)
    if made is None:
        return None
    mean, error, half, above = made
    larger = above((mean - bound) / error)
    p_for, p_against = min(1.0, 2 * larger), min(1.0, 2 * (1 - larger))
    if below:
        p_for, p_against = p_against, p_for
    return Evidence(mean, mean - half, mean + half, len(values), p_for, p_against)


def equivalence(values: Sequence[float], margin: float) -> Evidence | None:
    """Two one-sided t tests that the mean of values lies within ± `margin`.

    The p-value for the claim is the larger of the two; against it, twice the smaller p-value of a mean beyond
    an end. None without two values that differ. Source: Schuirmann (1987).
    """
    made = _t(values)
    if made is None:
        return None
    mean, error, half, above = made
    over_low, over_high = above((mean + margin) / error), above((mean - margin) / error)
    inside = max(over_low, 1 - over_high)
    beyond = min(1.0, 2 * min(1 - over_low, over_high))
    return Evidence(mean, mean - half, mean + half, len(values), inside, beyond)


def _t(values: Sequence[float]):
    """Mean, standard error, half of the 95 % interval, and the upper tail of Student's t."""
    from scipy.stats import t

    n = len(values)
    sample = np.asarray(values, float)
    if n < 2 or not np.isfinite(sample).all() or not sample.std() > 1e-12 * max(1.0, abs(sample).max()):
        return None
    error = float(sample.std(ddof=1)) / sqrt(n)
    half = float(t.ppf(0.975, n - 1)) * error
    return float(sample.mean()), error, half, lambda statistic: float(t.sf(statistic, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, which hold the probability of any false rejection. Source: Holm (1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def rank_correlation(table: "pd.DataFrame") -> tuple[float, float]:
    """Spearman's correlation of `sharpness` and `ratio` over objectives, and its two-sided p-value.

    The unit is an objective, the column `run`: of each, the mean over seeds of its rank within the seed, the
    column `replicate` or `seed`. The p-value is the share of the orders of the objectives that correlate as
    much, of all orders up to eight objectives, else of 9,999 drawn ones and the true one. A table without
    those columns has an objective a row. 0 and 1 where either is constant. Source: ours.
    """
    from scipy.stats import rankdata

    within = next((table[name] for name in ("replicate", "seed") if name in table), None)
    ranks = {}
    for column in ("sharpness", "ratio"):
        grouped = table[column].astype(float)
        ranks[column] = (
            grouped.rank() if within is None else grouped.groupby(within.to_numpy()).rank(pct=True)
        )
    run = table["run"].to_numpy() if "run" in table else np.arange(len(table))
    x, y = (rankdata(ranks[column].groupby(run).mean().round(12)) for column in ("sharpness", "ratio"))
    if min(len(set(x)), len(set(y))) < 2:
        return 0.0, 1.0
    x, y = x - x.mean(), y - y.mean()
    if len(x) <= EXACT:
        orders = np.array(list(permutations(y)))
    else:
        generator = np.random.default_rng(0)
        orders = np.vstack([y, generator.permuted(np.tile(y, (ORDERS, 1)), axis=1)])
    reached = abs(float(x @ y))
    p = float((np.abs(orders @ x) >= reached - 1e-9).mean())
    return float(x @ y / sqrt((x @ x) * (y @ y))), max(p, 2 / factorial(len(x)) if len(x) < 20 else 0.0)


def correlation_over_runs(x: np.ndarray, y: np.ndarray, runs: Sequence[str]) -> Evidence | None:
    """Pearson's correlation over points of several runs, with the jackknife's interval over runs.

    On Fisher's scale, by leaving out one run at a time, with Student's t of n - 1 degrees of freedom: points
    of one run are not independent. A bootstrap's percentiles over so few runs reject twice as often as they
    should. None with fewer than three runs, or where a correlation is not defined.
    """
    from scipy.stats import t

    names = list(dict.fromkeys(runs))
    n, of = len(names), np.asarray(runs)
    if n < 3:
        return None
    parts = [_fisher(x, y), *(_fisher(x[of != name], y[of != name]) for name in names)]
    if not all(isfinite(part) for part in parts):
        return None
    value, left = parts[0], np.array(parts[1:])
    error = sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))
    if error == 0:
        return None
    half = float(t.ppf(0.975, n - 1)) * error
    larger = float(t.sf(value / error, n - 1))
    ends = tanh(value - half), tanh(value + half)
    return Evidence(tanh(value), *ends, n, min(1.0, 2 * larger), min(1.0, 2 * (1 - larger)))


def _fisher(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = sqrt(float(x @ x) * float(y @ y))
    if not size > 0:
        return float("nan")
    return atanh(min(1 - 1e-12, max(-1 + 1e-12, float(x @ y) / size)))


def without_copies(table: "pd.DataFrame", columns: Sequence[str], place: Sequence[str]) -> "pd.DataFrame":
    """The rows of the first of the runs (`run_id`) whose `columns` have the same numbers, to 1e-6, at every
    `place`.

    The same training may be counted under two names, such as cross-entropy on the chosen responses of two
    preferences that share them.
    """
    seen: list[tuple[object, np.ndarray]] = []
    kept = []
    for run, part in table.groupby("run_id", sort=False):
        ordered = part.sort_values(list(place), kind="stable")
        numbers = ordered[list(columns)].astype(float).fillna(0.0).to_numpy()
        places = ordered[list(place)].astype(str).to_numpy().tolist()
        if not any(there == places and np.allclose(numbers, other, 1e-6, 0) for there, other in seen):
            seen.append((places, numbers))
            kept.append(run)
    return table[table["run_id"].isin(kept)]


def logs(values: "pd.Series") -> list[float]:
    """Natural logarithms of positive numbers."""
    return [log(value) for value in values]
