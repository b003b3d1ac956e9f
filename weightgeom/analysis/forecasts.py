"""Agreement of the ratios expected from a base's moments with the trained ones, over several trainings."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportOperatorIssue=false, reportAssignmentType=false

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def agreement(
    points: "pd.DataFrame", expected: Sequence[str], resamples: int = 2000, seed: int = 0
) -> "pd.DataFrame":
    """Pearson's correlation and the root mean squared difference of logarithms, each with its 95 % interval.

    `points` has a row for every run, layer and matrix: the column `run`, `measured`, and one of each name in
    `expected`; only rows that have them all count. The result has a row for each name: `points`, `runs`,
    `correlation` and `log_rmse` (natural logarithms), each of the two with `_low` and `_high`. The intervals
    are percentiles of a bootstrap that draws whole runs, because the matrices of one training share its
    data, its noise and its subspaces; with fewer than five runs they are too narrow, with one there are none.
    """
    import pandas as pd

    points = points.dropna(subset=["measured", *expected])
    runs = [part for _, part in points.groupby("run", sort=False)]
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(runs), size=(resamples if len(runs) > 1 else 0, len(runs)))
    rows = []
    for name in expected:
        pairs = [run[[name, "measured"]].to_numpy(float) for run in runs]
        row: dict[str, object] = {"expected": name, "points": len(points), "runs": len(runs)}
        for quantity, value in (("correlation", _correlation), ("log_rmse", _log_rmse)):
            row[quantity] = value(np.concatenate(pairs))
            samples = [value(np.concatenate([pairs[run] for run in drawn_runs])) for drawn_runs in drawn]
            ends = np.nanpercentile(samples, [2.5, 97.5]) if samples else (np.nan, np.nan)
            row[f"{quantity}_low"], row[f"{quantity}_high"] = map(float, ends)
        rows.append(row)
    return pd.DataFrame(rows)


def _correlation(pairs: np.ndarray) -> float:
    if not (pairs.std(0) > 0).all():
        return float("nan")
    return float(np.corrcoef(pairs.T)[0, 1])


def _log_rmse(pairs: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.diff(np.log(pairs), axis=1) ** 2)))
