import pandas as pd
import pytest

from weightgeom.analysis.over_seeds import rank_correlation


def rows(*ratios: float) -> pd.DataFrame:
    return pd.DataFrame({"sharpness": range(len(ratios)), "ratio": ratios})


def test_the_p_value_of_a_rank_correlation_counts_the_orders_that_correlate_as_much():
    # Of the 3! = 6 orders, the one and its reverse correlate perfectly: p = 2/6.
    assert rank_correlation(rows(1.0, 2.0, 5.0)) == (pytest.approx(1), pytest.approx(2 / 6))
    # Orders of four with |rank correlation| >= 0.8: 1234, those with one neighbouring swap (3), and reverses.
    assert rank_correlation(rows(1.0, 2.0, 5.0, 4.0)) == (pytest.approx(0.8), pytest.approx(8 / 24))
    statistic, p = rank_correlation(rows(*range(12)))
    assert statistic == pytest.approx(1) and 0 < p < 1e-8
    assert rank_correlation(rows(2.0, 2.0, 2.0)) == (0.0, 1.0)
