import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from weightgeom.geometry.bootstrap import bootstrap_interval, bootstrap_times


def test_a_bootstrap_draws_groups_with_replacement():
    times = bootstrap_times(6, 400, seed=1)
    assert times.shape == (400, 6) and bool((times.sum(1) == 6).all())
    assert_close(times, bootstrap_times(6, 400, seed=1), rtol=0, atol=0)
    # Multinomial: mean 1, variance 5/6 = 0.83; of 2400 draws, with five standard errors of each.
    assert abs(float(times.mean()) - 1) < 1e-6 and abs(float(times.var()) - 5 / 6) < 0.13
    assert len(bootstrap_times(1, 400, seed=1)) == 0


def test_the_interval_of_a_mean_is_that_of_students_t(generator):
    values = torch.randn(12, generator=generator, dtype=torch.float64) + 3
    times = bootstrap_times(12, 20_000, seed=0).double()
    interval = bootstrap_interval(float(values.mean()), (times @ values / 12).tolist(), 12)
    assert interval is not None
    low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    # 20,000 samples know the standard error to 0.5 % and the mean to 0.7 % of it.
    assert interval.stderr == pytest.approx(stats.sem(values), rel=0.025)
    assert interval.low == pytest.approx(low, abs=0.05 * interval.stderr)
    assert interval.high == pytest.approx(high, abs=0.05 * interval.stderr)


def test_the_interval_is_corrected_for_the_bias_that_the_samples_show():
    # The samples lie 0.2 below the estimate 1, on average: so does the estimate below what it estimates.
    interval = bootstrap_interval(1.0, [0.7, 0.8, 0.9], 10)
    assert interval is not None
    assert_close((interval.low + interval.high) / 2, 1.2)
    assert_close(interval.stderr, 0.1 * (10 / 9) ** 0.5)


def test_without_samples_there_is_no_interval():
    assert bootstrap_interval(1.0, [], 1) is None and bootstrap_interval(1.0, [0.9], 2) is None
