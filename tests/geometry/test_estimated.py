import pytest
import torch
from scipy import stats

from weightgeom.geometry.bootstrap import bootstrap_interval, widening
from weightgeom.geometry.nulls import (
    Estimated,
    adapter_moment,
    isotropic_null,
    matched_null,
    moment_root,
)
from weightgeom.geometry.subspace import Subspace

D, K = 48, 6


def test_a_level_without_error_is_that_of_the_null():
    null = isotropic_null(D, K, 20)
    assert Estimated(null, 0.0, 3).p_value(0.2) == null.p_value(0.2)
    assert Estimated(null, 0.0, 3).z(0.2) == pytest.approx(null.z(0.2))


def test_the_levels_error_widens_z_and_p():
    null = isotropic_null(D, K, 20)
    exact, estimated = null.p_value(0.2)[0], Estimated(null, 0.1, 7)
    assert estimated.p_value(0.2)[0] > exact
    sd = (null.sd**2 + (0.1 * null.mean) ** 2) ** 0.5
    assert estimated.z(0.2) == pytest.approx((0.2 - null.mean) / sd)
    levels = [1 + 0.1 * float(stats.t.ppf((place + 0.5) / 15, 7)) for place in range(15)]
    expected = sum(null.p_value(0.2 / level)[0] for level in levels) / 15
    assert estimated.p_value(0.2)[0] == pytest.approx(expected)


def test_intervals_of_few_tokens_are_wider():
    assert [widening(per) for per in (64.0, 16.0, 4.0, 1.0)] == [1, 1, 2, 4]
    wide, plain = (bootstrap_interval(0.5, [0.4, 0.5, 0.6], 16, per) for per in (1.0, 16.0))
    assert wide is not None and plain is not None
    assert wide.high - wide.low == pytest.approx(16 * (plain.high - plain.low))
    assert wide.stderr == plain.stderr


def test_an_adapter_near_its_start_has_the_share_of_its_own_moment():
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1.0, D + 1, dtype=torch.float64).pow(-0.5)
    moment = scale.square().diag()
    space, shares, levels, plain = Subspace.top(moment, K), [], [], float(scale[:K].square().sum())
    for _ in range(200):
        a = torch.randn(8, D, generator=generator, dtype=torch.float64)
        rows = torch.randn(400, D, generator=generator, dtype=torch.float64) * scale
        update = rows @ a.T @ a
        shares.append(space.fraction(update))
        levels.append(float(space.shares(adapter_moment(a, moment)).sum()))
    ratio = sum(shares) / sum(levels)
    assert abs(ratio - 1) < 0.02
    assert sum(shares) / 200 < 0.8 * plain / float(moment.trace())  # the plain level is far above


def test_the_p_value_of_an_adapter_is_uniform_where_b_is_random():
    generator = torch.Generator().manual_seed(1)
    space, rejected = Subspace.random(D, K, generator), 0
    for draw in range(200):
        a = torch.randn(8, D, generator=generator, dtype=torch.float64)
        x = torch.randn(64, 8, generator=generator, dtype=torch.float64) @ a
        null = matched_null(x.T @ x, moment_root(a.T @ a), space, draw, 99)
        rejected += null.p_value(space.explained(x.T @ x))[0] <= 0.05
    low, high = stats.binomtest(rejected, 200).proportion_ci(0.99)
    assert low <= 0.05 <= high
