from math import sqrt

import numpy as np
import pytest
import torch
from scipy import stats

from weightgeom.geometry.power_law import FEWEST, gaussian_spectra, power_law


def test_a_pareto_spectrum_has_its_exponent():
    # The quantiles of a Pareto law of tail index 1.5, whose density is ∝ x^-2.5.
    values = torch.from_numpy(stats.pareto.ppf((np.arange(400) + 0.5) / 400, 1.5))
    fit = power_law(values, np.random.default_rng(0), 99)
    assert fit is not None and fit.p_value is not None
    assert fit.exponent == pytest.approx(2.5, abs=0.1)
    assert fit.distance < 0.02 and fit.p_value > 0.9
    scaled = power_law(1e-6 * values, np.random.default_rng(0), 99)
    assert scaled is not None and scaled.exponent == pytest.approx(fit.exponent)


def test_exponent_and_distance_are_those_of_scipy():
    values = np.random.default_rng(1).lognormal(0, 1, 60)
    fit = power_law(torch.from_numpy(values), np.random.default_rng(0))
    assert fit is not None and fit.p_value is None
    above = np.sort(values)[::-1]
    tail, threshold = above[: fit.tail], above[fit.tail]
    index, _, _ = stats.pareto.fit(tail, floc=0, fscale=threshold)
    assert fit.exponent == pytest.approx(1 + index)
    law = stats.pareto(index, scale=threshold)
    assert fit.distance == pytest.approx(stats.kstest(tail, law.cdf).statistic)
    # No other of the tails is nearer to its fit.
    for m in np.unique(np.geomspace(FEWEST, 59, 32).astype(int)):
        index = m / np.log(above[:m] / above[m]).sum()
        assert stats.kstest(above[:m], stats.pareto(index, scale=above[m]).cdf).statistic >= fit.distance


def test_a_spectrum_without_a_power_law_is_far_from_its_fit():
    generator = np.random.default_rng(2)
    values = torch.from_numpy(np.concatenate([np.full(100, 1.0), np.linspace(5, 5.2, 100)]))
    fit = power_law(values, generator, 99)
    assert fit is not None and fit.p_value == 0.01


@pytest.mark.parametrize("values", [torch.ones(50), torch.arange(1.0, 12.0)])
def test_few_or_equal_values_have_no_fit(values):
    assert power_law(values, np.random.default_rng(0)) is None


@pytest.mark.slow
def test_the_p_value_of_pareto_samples_is_uniform():
    generator = np.random.default_rng(3)
    fits = [power_law(torch.from_numpy(1 + generator.pareto(2, 40)), generator, 39) for _ in range(500)]
    rejected = np.mean([fit is not None and fit.p_value is not None and fit.p_value <= 0.1 for fit in fits])
    assert abs(rejected - 0.1) < 3 * sqrt(0.1 * 0.9 / 500)


def test_gaussian_spectra_are_those_of_gaussian_matrices():
    generator = torch.Generator().manual_seed(4)
    drawn = gaussian_spectra(6, 9, 500, 0)
    direct = torch.linalg.svdvals(torch.randn(500, 6, 9, generator=generator, dtype=torch.float64)) ** 2
    # E ‖X‖² = 6 · 9, with the variance 2 · 6 · 9.
    assert abs(float(drawn.sum(1).mean()) - 54) < 4 * sqrt(2 * 54 / 500)
    for place in range(6):
        _, p = stats.ks_2samp(drawn[:, place], direct[:, place])
        assert float(p) > 0.001  # pyright: ignore[reportArgumentType]
    assert gaussian_spectra(1, 4, 3, 0).shape == (3, 1)
