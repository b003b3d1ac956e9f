# scipy types its results too widely.
# pyright: reportAttributeAccessIssue=false
from math import log, sqrt

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from weightgeom.analysis.evidence import (
    correlation_over_runs,
    direction,
    equivalence,
    holm,
    rank_correlation,
    without_copies,
)


def rows(*ratios: float) -> pd.DataFrame:
    return pd.DataFrame({"sharpness": range(len(ratios)), "ratio": ratios})


def test_a_direction_is_scipys_t_test():
    values = [0.3, 0.5, 0.1, 0.4]
    evidence = direction(values, 0.2)
    expected = stats.ttest_1samp(values, 0.2)
    ends = expected.confidence_interval(0.95)
    assert evidence is not None
    assert (evidence.low, evidence.high) == pytest.approx((ends.low, ends.high))
    assert evidence.p_for == pytest.approx(expected.pvalue) and evidence.p_against == 1
    below = direction(values, 0.2, below=True)
    assert below is not None and (below.p_for, below.p_against) == (evidence.p_against, evidence.p_for)


def test_an_equivalence_is_two_one_sided_t_tests():
    values, margin = [0.05, -0.02, 0.01, 0.08], log(1.25)
    evidence = equivalence(values, margin)
    over = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    under = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert evidence is not None and evidence.p_for == pytest.approx(max(over, under))
    outside = equivalence([value + 1 for value in values], margin)
    assert outside is not None and outside.p_against < 0.01 and outside.p_for > 0.99


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0, 1.0], [1.0, float("nan")]])
def test_fewer_than_two_different_values_are_no_evidence(values):
    assert direction(values) is None and equivalence(values, 0.2) is None


def test_false_rejections_occur_at_the_nominal_rate():
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(2000, 3))
    directions = [direction(list(sample)) for sample in samples]
    rate = np.mean([evidence is not None and evidence.p_for <= 0.05 for evidence in directions])
    assert abs(rate - 0.025) < 3 * sqrt(0.025 * 0.975 / 2000)
    margin = log(1.25)  # a true mean at the margin itself
    shifted = [equivalence(list(margin + 0.1 * sample), margin) for sample in samples]
    rate = np.mean([evidence is not None and evidence.p_for <= 0.05 for evidence in shifted])
    assert rate < 0.05 + 3 * sqrt(0.05 * 0.95 / 2000)


def test_holms_p_values_are_known():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9]) == [0.9]


def test_the_p_value_of_a_rank_correlation_counts_the_orders_that_correlate_as_much():
    # Of the 3! = 6 orders, the one and its reverse correlate perfectly: p = 2/6.
    assert rank_correlation(rows(1.0, 2.0, 5.0)) == (pytest.approx(1), pytest.approx(2 / 6))
    # Orders of four with |rank correlation| >= 0.8: 1234, those with one neighbouring swap (3), and reverses.
    assert rank_correlation(rows(1.0, 2.0, 5.0, 4.0)) == (pytest.approx(0.8), pytest.approx(8 / 24))
    statistic, p = rank_correlation(rows(*range(12)))
    assert statistic == pytest.approx(1) and p == pytest.approx(1e-4)
    assert rank_correlation(rows(2.0, 2.0, 2.0)) == (0.0, 1.0)


def test_seeds_of_an_objective_are_no_further_points_of_its_order():
    once = rows(1.0, 2.0, 5.0, 4.0)
    seeds = [once.assign(run=list("abcd"), seed=seed, ratio=once["ratio"] + 10 * seed) for seed in range(3)]
    assert rank_correlation(pd.concat(seeds)) == pytest.approx(rank_correlation(once))


def test_a_rank_correlation_of_objectives_by_chance_rejects_at_most_at_its_level():
    generator = np.random.default_rng(1)
    rejected = 0
    for _ in range(400):
        table = pd.DataFrame({
            "run": np.repeat(np.arange(6), 3), "seed": np.tile(np.arange(3), 6),
            "sharpness": np.repeat(generator.normal(size=6), 3) + 0.05 * generator.normal(size=18),
            "ratio": np.repeat(generator.normal(size=6), 3) + 0.2 * generator.normal(size=18),
        })  # fmt: skip
        rejected += rank_correlation(table)[1] <= 0.05
    assert rejected / 400 < 0.05 + 3 * sqrt(0.05 * 0.95 / 400)


def test_points_of_one_run_are_not_independent():
    generator = np.random.default_rng(2)
    false, runs = 0, np.repeat(np.arange(6), 8)
    for _ in range(500):
        x, y = (
            np.repeat(generator.normal(size=6), 8) * sqrt(0.8) + generator.normal(size=48) * sqrt(0.2)
            for _ in range(2)
        )
        interval = correlation_over_runs(x, y, list(map(str, runs)))
        assert interval is not None and interval.low <= interval.value <= interval.high
        false += interval.low > 0
    assert false / 500 < 0.025 + 3 * sqrt(0.025 * 0.975 / 500)


def test_two_runs_or_constant_points_have_no_interval():
    x = np.arange(6.0)
    assert correlation_over_runs(x, x, list("aaabbb")) is None
    assert correlation_over_runs(x, 0 * x, list("aabbcc")) is None


def test_copies_of_a_run_are_left_out_in_whatever_order_their_rows_are():
    table = pd.DataFrame({
        "run_id": list("aabbcc"), "layer": [0, 1, 1, 0, 0, 1], "ratio": [1.0, 2.0, 2.0, 1.0 + 1e-9, 1.0, 2.1],
    })  # fmt: skip
    assert list(without_copies(table, ["ratio"], ["layer"])["run_id"]) == list("aacc")
