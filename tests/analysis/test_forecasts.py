from math import log, sqrt

import numpy as np
import pandas as pd
import pytest

from weightgeom.analysis.forecasts import agreement


def test_correlation_and_log_rmse_are_those_of_all_points():
    points = pd.DataFrame({
        "run": ["a", "a", "b", "b"],
        "measured": [1.0, 2.0, 3.0, 4.0],
        "twice": [2.0, 4.0, 6.0, 8.0],
        "other": [2.0, 1.0, 4.0, 3.0],
    })  # fmt: skip
    twice, other = agreement(points, ["twice", "other"]).to_dict("records")
    assert twice["correlation"] == pytest.approx(1) and twice["log_rmse"] == pytest.approx(log(2))
    assert (twice["log_rmse_low"], twice["log_rmse_high"]) == pytest.approx((log(2), log(2)))
    # Deviations -1.5 -0.5 0.5 1.5 and -0.5 -1.5 1.5 0.5: (0.75 + 0.75 + 0.75 + 0.75) / 5 = 0.6.
    assert other["correlation"] == pytest.approx(0.6)
    expected = sqrt((2 * log(2) ** 2 + 2 * log(4 / 3) ** 2) / 4)
    assert other["log_rmse"] == pytest.approx(expected)
    assert (other["points"], other["runs"]) == (4, 2)


def test_the_interval_is_over_runs_and_not_over_their_points():
    generator = np.random.default_rng(0)
    # Ten runs of forty points: their factor is the run's own, and the points add next to nothing.
    factors = np.exp(generator.normal(size=10) * 0.3)
    points = pd.DataFrame({
        "run": np.repeat(np.arange(10), 40),
        "measured": np.ones(400) + generator.normal(size=400) * 1e-3,
        "expected": np.repeat(factors, 40),
    })  # fmt: skip
    (row,) = agreement(points, ["expected"]).to_dict("records")
    squares = np.log(factors) ** 2
    # The delta method: sd of the mean of ten squares over twice its root, times 3.92 for both sides.
    width = 3.92 * squares.std(ddof=1) / sqrt(10) / (2 * sqrt(squares.mean()))
    assert row["log_rmse"] == pytest.approx(sqrt(squares.mean()), rel=1e-2)
    assert row["log_rmse_high"] - row["log_rmse_low"] == pytest.approx(width, rel=0.35)


def test_points_that_lack_an_expectation_are_left_out_and_one_run_has_no_interval():
    points = pd.DataFrame({"run": ["a"] * 4, "measured": [1.0, 2, 3, 5], "x": [1.0, 2, 3, np.nan]})
    (row,) = agreement(points, ["x"]).to_dict("records")
    assert row["points"] == 3 and row["correlation"] == pytest.approx(1)
    assert np.isnan(row["correlation_low"])
