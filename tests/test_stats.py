from math import inf, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from weightgeom.stats import Null, isotropic_null, rotation_null
from weightgeom.subspace import Subspace

D, K = 24, 3
# Squared singular values of matrices with D columns, from one direction to all but flat.
SPECTRA = {
    "rank 1": [1.0],
    "rank 2, equal": [1.0, 1.0],
    "rank 2": [4.0, 1.0],
    "rank 3": [5.0, 3.0, 2.0],
    "geometric": [0.7**i for i in range(D)],
    "half": [1.0] * (D // 2),
    "one above the rest": [3.0] + [1.0] * (D - 1),
}


def with_spectrum(spectrum: list[float], generator: torch.Generator, rows: int) -> Tensor:
    """A matrix of D columns with these squared singular values, its singular vectors random."""
    right = Subspace.random(D, len(spectrum), generator).basis
    left = Subspace.random(rows, len(spectrum), generator).basis
    return left @ torch.tensor(spectrum, dtype=torch.float64).sqrt().diag() @ right.T


def sampled(x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """The fractions of `x` inside Haar-random subspaces, drawn here and not by the library."""
    gaussian = torch.randn(draws, D, K, generator=generator, dtype=torch.float64)
    bases = torch.linalg.qr(gaussian).Q
    return (x @ bases).square().sum((1, 2)) / x.square().sum()


@pytest.mark.parametrize("rows", [D, 3 * D])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_mean_and_sd_of_the_rotation_null_are_those_over_random_subspaces(spectrum, rows, generator):
    x = with_spectrum(spectrum, generator, rows)
    null, fractions = rotation_null(x, K), sampled(x, 20_000, generator)
    n, deviation = len(fractions), fractions - null.mean
    # Five standard errors: of the mean sd/√n, of the variance √((m4 - sd⁴)/n).
    assert abs(deviation.mean()) < 5 * null.sd / sqrt(n)
    fourth = deviation.pow(4).mean()
    assert abs(deviation.square().mean() - null.sd**2) < 5 * ((fourth - null.sd**4) / n).sqrt()


def test_the_rotation_null_of_two_equal_directions_in_three_dimensions():
    # p = (1/2, 1/2), d = 3, k = 1: s² = 2·1·2/(9·5) = 4/45, var = 4/45 · (3·1/2 - 1)/2 = 1/45
    null = rotation_null(torch.eye(3)[:2], 1)
    assert_close(null.mean, 1 / 3)
    assert_close(null.sd, sqrt(1 / 45))


@given(st.integers(2, 40), st.data())
def test_the_rotation_null_of_a_rank_1_matrix_is_its_beta(d, data):
    k = data.draw(st.integers(1, d - 1))
    u, v = torch.arange(1.0, 4), torch.arange(1.0, d + 1)
    # Beta(a, b) with a, b = k/2, (d - k)/2, from the mean and the variance
    shape = rotation_null(torch.outer(u, v), k).shape()
    assert_close(shape, (k / 2, (d - k) / 2), rtol=1e-6, atol=1e-6)


@given(st.integers(2, 12), st.data())
def test_the_rotation_null_does_not_depend_on_the_singular_vectors(d, data):
    k, n, seed = data.draw(st.tuples(st.integers(1, d), st.integers(1, 8), st.integers(0, 10_000)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rotated = Subspace.random(n, n, generator).basis @ x @ Subspace.random(d, d, generator).basis
    null, other = rotation_null(x, k), rotation_null(3 * rotated, k)
    assert other.mean == null.mean
    # The variance is a difference of numbers of order 1: good to 1e-14, its root to 1e-7.
    assert_close(other.sd, null.sd, rtol=1e-7, atol=1e-7)


def test_p_values_of_a_rank_1_matrix_under_the_rotation_null_are_uniform(generator):
    x = with_spectrum(SPECTRA["rank 1"], generator, 8)
    null = rotation_null(x, K)
    p_values = [null.p_value(float(fraction)) for fraction in sampled(x, 1000, generator)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


# The largest distance from uniform at d = 24, k = 3, measured over 2·10⁴ draws (which know it to
# 0.01) and rounded up: low-rank and decaying spectra are close, the last one is not.
DISTANCE = {
    "rank 2, equal": 0.02,
    "rank 2": 0.02,
    "rank 3": 0.02,
    "geometric": 0.02,
    "half": 0.03,
    "one above the rest": 0.10,
}


@pytest.mark.parametrize("name", DISTANCE)
def test_p_values_of_other_matrices_are_close_to_uniform(name, generator):
    x = with_spectrum(SPECTRA[name], generator, D)
    a, b = rotation_null(x, K).shape()
    p_values = stats.beta.sf(sampled(x, 20_000, generator).numpy(), a, b)
    assert stats.kstest(p_values, "uniform").statistic < DISTANCE[name]
    if DISTANCE[name] < 0.1:
        # A nominal 1 % is 0.3 to 1.5 %; sampling adds less than 0.1 %.
        assert 0.003 < (p_values < 0.01).mean() < 0.015


def test_the_isotropic_null_is_the_beta_of_gaussian_noise():
    # d = 24, k = 3, n = 10: Beta(15, 105)
    null = isotropic_null(24, 3, 10)
    assert_close(null.shape(), (15.0, 105.0))
    assert_close((null.mean, null.sd), (stats.beta(15, 105).mean(), stats.beta(15, 105).std()))


@given(st.integers(2, 60), st.data())
def test_the_isotropic_null_of_a_single_row_is_the_rotation_null_of_rank_1(d, data):
    k = data.draw(st.integers(1, d - 1))
    one, other = isotropic_null(d, k, 1), rotation_null(torch.ones(1, d), k)
    assert_close((one.mean, one.sd), (other.mean, other.sd))


def test_z_counts_standard_deviations_and_the_p_value_is_one_sided():
    null = Null(0.25, 0.05)
    # Beta by moments: 0.25·0.75/0.0025 - 1 = 74, so Beta(18.5, 55.5)
    assert_close(null.shape(), (18.5, 55.5))
    assert_close(null.z(0.4), 3.0)
    assert_close(null.z(0.2), -1.0)
    assert_close(null.p_value(0.4), float(1 - stats.beta(18.5, 55.5).cdf(0.4)))
    assert null.p_value(0.0) == 1 and null.p_value(1.0) == 0


@pytest.mark.parametrize(
    "null",
    [
        isotropic_null(6, 6, 4),
        rotation_null(torch.ones(3, 6), 6),  # k = d
        rotation_null(torch.eye(5), 2),  # equal singular values
        rotation_null(torch.ones(3, 1), 1),  # d = 1
    ],
)
def test_a_null_without_spread_says_that_nothing_is_exceptional(null):
    assert null.sd == 0 and null.shape() == (inf, inf)
    assert null.z(null.mean) == null.z(1.0) == 0.0
    assert null.p_value(null.mean) == null.p_value(1.0) == 1.0


@given(st.integers(1, 24), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 10_000))
def test_singular_values_that_are_equal_up_to_rounding_give_no_nan(k, dtype, seed):
    space = Subspace.random(D, D, torch.Generator().manual_seed(seed))
    x = space.basis.to(dtype)
    null = rotation_null(x, k)
    assert 0 <= null.sd < 1e-6
    fraction = space.first(k).fraction(x)
    # Either without spread (p = 1), or the fraction is within rounding of the mean.
    assert 0 <= null.p_value(fraction) <= 1 and abs(null.z(fraction)) < inf


def test_a_very_narrow_null_has_the_p_values_of_a_normal():
    narrow, narrower = Null(0.25, 1e-6), Null(0.25, 1e-9)  # Beta, and beyond what scipy's can do
    for z in (-2, 0, 1, 3):
        expected = float(stats.norm.sf(z))
        # 0.25 + z·1e-9 is rounded to 6e-17, which is 6e-8 sd.
        assert_close(narrower.p_value(0.25 + z * 1e-9), expected, rtol=1e-5, atol=0)
        assert_close(narrow.p_value(0.25 + z * 1e-6), expected, rtol=1e-4, atol=0)


def test_an_all_zero_matrix_is_refused():
    with pytest.raises(ValueError, match="an all-zero matrix has no singular directions to rotate"):
        rotation_null(torch.zeros(3, 4), 2)
