from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from weightgeom.geometry import nulls
from weightgeom.geometry.nulls import (
    beta_null,
    isotropic_null,
    left_concentration,
    matched_null,
    moment_root,
    rank_p_value,
    relabelled,
    rotation_null,
    spectrum_shares,
)
from weightgeom.geometry.subspace import Subspace

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


def of(x: Tensor, k: int, draws: int = 999):
    """The rotation null of a matrix."""
    return rotation_null(spectrum_shares(x.T @ x), k, seed=0, draws=draws)


def assert_calibrated(p_values: list[float]) -> None:
    """2,000 p-values under the null are uniform, and 5 % of them are below 0.05."""
    assert len(p_values) == 2000
    # 1 % over the 26 nulls below: at 1 % each, one in four of seeds would fail somewhere.
    assert stats.kstest(p_values, "uniform").pvalue > 0.01 / 26
    low, high = stats.binom.interval(0.99, 2000, 0.05)
    assert low <= (np.array(p_values) < 0.05).sum() <= high


@pytest.mark.parametrize("rows", [D, 3 * D])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_mean_and_sd_of_the_rotation_null_are_those_over_random_subspaces(spectrum, rows, generator):
    x = with_spectrum(spectrum, generator, rows)
    null, fractions = of(x, K), sampled(x, 20_000, generator)
    n, deviation = len(fractions), fractions - null.mean
    # Five standard errors: of the mean sd/√n, of the variance √((m4 - sd⁴)/n).
    assert abs(deviation.mean()) < 5 * null.sd / sqrt(n)
    fourth = deviation.pow(4).mean()
    assert abs(deviation.square().mean() - null.sd**2) < 5 * ((fourth - null.sd**4) / n).sqrt()


def test_the_rotation_null_of_two_equal_directions_in_three_dimensions():
    # p = (1/2, 1/2), d = 3, k = 1: s² = 2·1·2/(9·5) = 4/45, var = 4/45 · (3·1/2 - 1)/2 = 1/45
    null = of(torch.eye(3)[:2], 1)
    assert_close(null.mean, 1 / 3)
    assert_close(null.sd, sqrt(1 / 45))
    # The fraction is (1 - u²)/2 for a coordinate u of a random unit vector in R³, uniform in [0, 1]:
    # P(fraction ≥ 3/8) = P(u ≤ 1/2) = 1/2
    p, error = of(torch.eye(3)[:2], 1, draws=100_000).p_value(3 / 8)
    assert error is not None
    assert_close(error, sqrt(0.25 / 100_000), rtol=1e-3, atol=0)
    assert abs(p - 0.5) < 5 * error


@given(st.integers(2, 40), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_the_rotation_null_of_a_rank_1_matrix_is_its_beta(d, dtype, data):
    k = data.draw(st.integers(1, d - 1))
    u, v = torch.arange(1.0, 4), torch.arange(1.0, d + 1)
    null = of(torch.outer(u, v).to(dtype), k)
    for fraction in (0.1, 0.5, 0.9):
        expected = float(stats.beta(k / 2, (d - k) / 2).sf(fraction))
        # Eigenvalues good to 1e-7 (fp32) move the shape by as much, relatively, and p by 100 of it at most.
        assert null.p_value(fraction) == (pytest.approx(expected, rel=1e-5), None)


@given(st.integers(2, 12), st.data())
def test_the_rotation_null_does_not_depend_on_the_singular_vectors(d, data):
    k, n, seed = data.draw(st.tuples(st.integers(1, d), st.integers(1, 8), st.integers(0, 10_000)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rotated = Subspace.random(n, n, generator).basis @ x @ Subspace.random(d, d, generator).basis
    null, other = of(x, k), of(3 * rotated, k)
    assert other.mean == null.mean
    # The variance is a difference of numbers of order 1: good to 1e-14, its root to 1e-7.
    assert_close(other.sd, null.sd, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [K, D - K])
def test_p_values_under_the_rotation_null_are_calibrated(name, k, generator):
    x = with_spectrum(SPECTRA[name], generator, D)
    # 50,000 draws, as all p-values share them: their own error of 1/√50,000 is a fifth of 1/√2,000.
    null = of(x, k, draws=50_000)
    fractions = sampled(x, 2000, generator)
    fractions = fractions if k == K else 1 - fractions
    assert_calibrated([null.p_value(float(fraction))[0] for fraction in fractions])


@pytest.mark.slow
def test_p_values_under_the_rotation_null_are_calibrated_with_few_draws_of_their_own(generator):
    x = with_spectrum(SPECTRA["one above the rest"], generator, D)
    shares = spectrum_shares(x.T @ x)
    fractions = sampled(x, 2000, generator)
    nulls = [rotation_null(shares, K, seed, draws=199) for seed in range(2000)]
    assert_calibrated(
        [null.p_value(float(fraction))[0] for null, fraction in zip(nulls, fractions, strict=True)]
    )


def test_draws_of_large_bases_in_fp32_have_the_moments_of_the_rotation_null(generator):
    d, k, draws = 300, 40, 4000
    null = rotation_null(
        torch.arange(1.0, d + 1).pow(-1) / torch.arange(1.0, d + 1).pow(-1).sum(), k, 0, draws
    )
    for z in (-1.0, 0.0, 1.0):
        p, error = null.p_value(null.mean + z * null.sd)
        assert error is not None
        # The Beta of this mean and sd is within 0.01 of the distribution.
        expected, _ = beta_null(null.mean, null.sd).p_value(null.mean + z * null.sd)
        assert abs(p - expected) < 5 * error + 0.01


def test_p_values_under_the_isotropic_null_are_calibrated(generator):
    space, null = Subspace.random(D, K, generator), isotropic_null(D, K, 10)
    noise = torch.randn(2000, 10, D, generator=generator, dtype=torch.float64)
    assert_calibrated([null.p_value(space.fraction(x))[0] for x in noise])


def test_the_isotropic_null_is_the_beta_of_gaussian_noise():
    # d = 24, k = 3, n = 10: Beta(15, 105)
    null, beta = isotropic_null(24, 3, 10), stats.beta(15, 105)
    assert_close((null.mean, null.sd), (beta.mean(), beta.std()))
    assert null.p_value(0.2) == (pytest.approx(beta.sf(0.2), rel=1e-9), None)


@given(st.integers(2, 60), st.data())
def test_the_isotropic_null_of_a_single_row_is_the_rotation_null_of_rank_1(d, data):
    k = data.draw(st.integers(1, d - 1))
    isotropic, other = isotropic_null(d, k, 1), of(torch.ones(1, d), k)
    assert_close((isotropic.mean, isotropic.sd), (other.mean, other.sd))


def test_z_counts_standard_deviations_and_the_p_value_is_one_sided():
    null = beta_null(0.25, 0.05)
    assert_close(null.z(0.4), 3.0)
    assert_close(null.z(0.2), -1.0)
    # Beta by moments: 0.25·0.75/0.0025 - 1 = 74, so Beta(18.5, 55.5)
    assert_close(null.p_value(0.4)[0], float(1 - stats.beta(18.5, 55.5).cdf(0.4)))
    assert null.p_value(0.0) == (1, None) and null.p_value(1.0) == (0, None)


def test_a_sampled_p_value_is_never_0_and_its_error_is_that_of_its_draws():
    null = of(torch.eye(5)[:2], 2, draws=99)
    # Nothing exceeds 1, everything 0: p = (1 + 0)/(1 + 99) with √(p (1 - p)/99), and 1 with 0
    assert null.p_value(1.1) == (0.01, pytest.approx(sqrt(0.01 * 0.99 / 99)))
    assert null.p_value(-0.1) == (1.0, 0.0)


def test_the_seed_decides_the_draws(generator):
    x = with_spectrum(SPECTRA["geometric"], generator, D)
    root, space = moment_root(torch.eye(D)), Subspace.random(D, K, generator)
    for null in (
        lambda seed: rotation_null(spectrum_shares(x.T @ x), K, seed),
        lambda seed: matched_null(x.T @ x, root, space, seed),
    ):
        first, again, other = (null(seed).p_value(0.13) for seed in (1, 1, 2))
        assert first == again != other


@pytest.mark.parametrize(
    "null",
    [
        isotropic_null(6, 6, 4),
        of(torch.ones(3, 6), 6),  # k = d
        of(torch.eye(5), 2),  # equal singular values
        of(torch.ones(3, 1), 1),  # d = 1
        matched_null(torch.eye(4), moment_root(torch.eye(4)), Subspace(torch.eye(4)), 0),  # k = d
        matched_null(torch.ones(4, 4), moment_root(torch.ones(4, 4)), Subspace(torch.eye(4)[:, :2]), 0),
        matched_null(torch.ones(1, 1), moment_root(torch.ones(1, 1)), Subspace(torch.eye(1)), 0),  # d = 1
    ],
)
def test_under_a_null_without_spread_no_fraction_is_exceptional(null):
    assert null.sd == 0
    assert null.z(null.mean) == null.z(1.0) == 0.0
    assert null.p_value(null.mean) == null.p_value(1.0) == (1.0, None)


@given(st.integers(1, 24), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 10_000))
def test_singular_values_that_are_equal_up_to_rounding_give_no_nan(k, dtype, seed):
    space = Subspace.random(D, D, torch.Generator().manual_seed(seed))
    x = space.basis.to(dtype)
    null = of(x, k)
    assert 0 <= null.sd < 1e-6
    fraction = space.first(k).fraction(x)
    # Either without spread (p = 1), or the fraction is within rounding of the mean.
    assert 0 <= null.p_value(fraction)[0] <= 1 and abs(null.z(fraction)) < float("inf")


def test_a_very_narrow_null_has_the_p_values_of_a_normal():
    narrow, narrower = beta_null(0.25, 1e-6), beta_null(0.25, 1e-9)  # Beta, and beyond what scipy's can do
    for z in (-2, 0, 1, 3):
        expected = float(stats.norm.sf(z))
        # 0.25 + z·1e-9 is rounded to 6e-17, which is 6e-8 sd.
        assert_close(narrower.p_value(0.25 + z * 1e-9)[0], expected, rtol=1e-5, atol=0)
        assert_close(narrow.p_value(0.25 + z * 1e-6)[0], expected, rtol=1e-4, atol=0)


# Second moments with D directions, and squared singular values of the mixing L.
MOMENTS = {
    "power law": torch.arange(1.0, D + 1).pow(-1),
    "isotropic": torch.ones(D),
    "outlier": torch.cat([torch.tensor([60.0]), torch.arange(2.0, D + 1).pow(-1)]),
    "low rank": torch.cat([torch.arange(1.0, 13).pow(-0.5), torch.zeros(D - 12)]),
}
MIXINGS = {
    "rank 1": torch.ones(1),
    "few rows": torch.ones(4),
    "many rows": torch.ones(300),
    "decaying": 0.8 ** torch.arange(60.0),
}


def second_moment(eigenvalues: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A second moment with these eigenvalues, and its axes."""
    axes = Subspace.random(len(eigenvalues), len(eigenvalues), generator).basis
    return (axes * eigenvalues) @ axes.T, axes


def mixed(eigenvalues: Tensor, axes: Tensor, mixing: Tensor, generator: torch.Generator) -> Tensor:
    """x = L Z C^{1/2}, up to a rotation from the left that its Gram matrix does not see."""
    z = torch.randn(len(mixing), len(axes), generator=generator, dtype=torch.float64)
    return (mixing.sqrt()[:, None] * z * eigenvalues.sqrt()) @ axes.T


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["eigenvectors", "another subspace"])
@pytest.mark.parametrize(
    ("name", "mixing"), [*(("power law", mixing) for mixing in MIXINGS), ("isotropic", "few rows")]
)
def test_p_values_under_the_matched_null_are_calibrated(name, mixing, own, generator):
    eigenvalues = MOMENTS[name]
    moment, axes = second_moment(eigenvalues, generator)
    root = moment_root(moment)
    space = Subspace(axes[:, :K].contiguous()) if own else Subspace.random(D, K, generator)
    p_values = []
    for seed in range(2000):
        x = mixed(eigenvalues, axes, MIXINGS[mixing], generator)
        p_values.append(matched_null(x.T @ x, root, space, seed, draws=199).p_value(space.fraction(x))[0])
    # The 200 values that p can have are at the upper ends of 200 intervals of equal probability.
    spread = torch.rand(2000, generator=generator).numpy() / 200
    assert_calibrated(list(np.array(p_values) - spread))


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["eigenvectors", "another subspace"])
@pytest.mark.parametrize("name", MOMENTS)
def test_mean_and_sd_of_the_matched_null_are_those_of_many_mixed_rows(name, own, generator):
    eigenvalues = MOMENTS[name]
    moment, axes = second_moment(eigenvalues, generator)
    root, mixing = moment_root(moment), torch.ones(300)
    space = Subspace(axes[:, :K].contiguous()) if own else Subspace.random(D, K, generator)
    xs = [mixed(eigenvalues, axes, mixing, generator) for _ in range(500)]
    fractions = torch.tensor([space.fraction(x) for x in xs], dtype=torch.float64)
    nulls = [matched_null(x.T @ x, root, space, 0) for x in xs]
    assert_close(nulls[0].mean, space.explained(moment), rtol=1e-6, atol=1e-6)
    # Five standard errors, 1/√500 of an sd for the mean and 1/√1000 for the sd. What is of second order in
    # ψ = 1/300 shifts the mean by less than a tenth of an sd, and the sd by less than 4 %.
    assert abs(fractions.mean() - nulls[0].mean) < (0.1 + 5 / sqrt(500)) * fractions.std()
    typical = torch.tensor([null.sd for null in nulls]).square().mean().sqrt()
    assert_close(float(typical), float(fractions.std()), rtol=0.2, atol=0)


def test_the_matched_null_of_isotropic_rows_is_the_isotropic_null(generator):
    rows, space = 50, Subspace.random(D, K, generator)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    null = matched_null(x.T @ x, moment_root(torch.eye(D)), space, 0, draws=20_000)
    exact = isotropic_null(D, K, rows)
    assert_close(null.mean, exact.mean)
    # ψ = 1/50 is known to √(2 / (24·23/2)) = 8.5 %, the sd to half of that; three of those.
    assert_close(null.sd, exact.sd, rtol=0.13, atol=0)
    for z in (-1.0, 0.0, 1.0):
        p, q = null.p_value(exact.mean + z * exact.sd)[0], exact.p_value(exact.mean + z * exact.sd)[0]
        # 13 % of z = 1 are 0.13 sd, at a density of 0.24 a sd; five errors of 20,000 draws are 0.018.
        assert abs(p - q) < 0.05


def test_an_update_planted_inside_the_subspace_exceeds_the_matched_null(generator):
    moment, _ = second_moment(MOMENTS["power law"], generator)
    space = Subspace.random(D, K, generator)
    x = torch.randn(20, K, generator=generator, dtype=torch.float64) @ space.basis.T
    null = matched_null(x.T @ x, moment_root(moment), space, 0)
    assert null.p_value(space.fraction(x))[0] == 1 / 1000 and null.z(space.fraction(x)) > 3


@pytest.mark.parametrize("name", MOMENTS)
def test_the_left_concentration_is_one_over_the_effective_number_of_rows(name, generator):
    eigenvalues = MOMENTS[name]
    moment, axes = second_moment(eigenvalues, generator)
    root = moment_root(moment)
    for mixing in MIXINGS.values():
        psi = float(mixing.square().sum() / mixing.sum() ** 2)
        estimates = [
            left_concentration(x.T @ x, root)
            for x in (mixed(eigenvalues, axes, mixing, generator) for _ in range(200))
        ]
        # A ratio of means: its bias is of the order of its variance, below 5 %; sampling adds 5 · 35 %/√200.
        assert_close(float(np.mean(estimates)), psi, rtol=0.05 + 5 * 0.35 / sqrt(200), atol=0)
        assert all(0 < estimate <= 1 for estimate in estimates)


def test_the_left_concentration_of_one_row_is_1(generator):
    root = moment_root(second_moment(MOMENTS["power law"], generator)[0])
    x = torch.randn(1, D, generator=generator, dtype=torch.float64)
    assert_close(left_concentration(x.T @ x, root), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_of_a_moment_gives_it_back_and_its_columns_are_orthogonal(dtype, generator):
    moment = second_moment(MOMENTS["low rank"], generator)[0].to(dtype)
    root = moment_root(moment)
    # Negative eigenvalues of the size of the rounding are dropped: D · 6e-8 in fp32.
    assert_close(root @ root.T, moment.double(), rtol=0, atol=1e-6)
    gram = root.T @ root
    assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-12)


def test_an_all_zero_matrix_is_refused():
    with pytest.raises(ValueError, match="an all-zero matrix has no singular directions to rotate"):
        spectrum_shares(torch.zeros(4, 4))
    root, space = moment_root(torch.eye(4)), Subspace(torch.eye(4)[:, :2])
    message = "an all-zero matrix has no rows to compare with a second moment"
    with pytest.raises(ValueError, match=message):
        matched_null(torch.zeros(4, 4), root, space, 0)
    with pytest.raises(ValueError, match=message):
        left_concentration(torch.zeros(4, 4), root)


@pytest.mark.parametrize("bad", [torch.zeros(4, 4), -torch.eye(4), torch.full((4, 4), float("nan"))])
def test_a_second_moment_without_a_positive_trace_is_refused(bad):
    with pytest.raises(ValueError, match="the trace of a second moment must be positive, got "):
        moment_root(bad)


@pytest.mark.parametrize(
    ("treatment", "p"),
    [
        (5.0, 1 / 5),  # none of four is as large: (1 + 0)/(1 + 4)
        (4.0, 2 / 5),  # one is equal, which counts
        (2.5, 3 / 5),
        (0.0, 1.0),
    ],
)
def test_the_p_value_of_a_treatment_is_its_rank_among_the_controls(treatment, p):
    controls = torch.tensor([1.0, 4.0, 2.0, 3.0])
    assert rank_p_value(torch.tensor(treatment), controls) == p


def test_the_rank_p_value_of_an_exchangeable_treatment_is_valid_at_every_level(generator):
    draws = torch.randn(2000, 20, generator=generator)
    p = torch.tensor([rank_p_value(draw[0], draw[1:]) for draw in draws])
    for level in (0.05, 0.1, 0.5):
        # P(p ≤ level) is the level, as it is a multiple of 1/20; five standard deviations of the binomial.
        share = float((p <= level + 1e-6).double().mean())
        assert abs(share - level) < 5 * sqrt(level * (1 - level) / 2000)


def test_p_values_at_several_levels_are_those_of_each_level_by_itself(generator):
    # Of a subspace that is none of the moment's own, whose eigenvalues are interpolated between three levels.
    moment, _ = second_moment(MOMENTS["power law"], generator)
    x = torch.randn(40, D, generator=generator, dtype=torch.float64) @ moment_root(moment).T
    null = matched_null(x.T @ x, moment_root(moment), Subspace.random(D, K, generator), 0, draws=4999)
    fractions = [null.mean + step * null.sd for step in torch.linspace(-2, 3, 15).tolist()]
    together = [p for p, _ in null.p_values(fractions)]
    alone = [null.p_value(fraction)[0] for fraction in fractions]
    assert max(alone) > 0.9 and min(alone) < 0.01
    # A tenth of the Monte Carlo error, of which both have the same.
    for p, other in zip(together, alone, strict=True):
        assert abs(p - other) <= 0.1 * sqrt(other * (1 - other) / 4999) + 1 / 5000


@pytest.mark.parametrize("own", [True, False], ids=["eigenvectors", "another subspace"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_p_values_that_need_no_samples_are_those_of_samples(mixing, own, generator, monkeypatch):
    eigenvalues = MOMENTS["power law"]
    moment, axes = second_moment(eigenvalues, generator)
    space = Subspace(axes[:, :K].contiguous()) if own else Subspace.random(D, K, generator)
    x = mixed(eigenvalues, axes, MIXINGS[mixing], generator)
    null = matched_null(x.T @ x, moment_root(moment), space, 0)
    fractions = [min(1.0, max(0.0, null.mean + step * null.sd)) for step in range(-30, 31, 3)]
    quick = [null.p_value(fraction) for fraction in fractions]
    drawn: list[float] = []
    monkeypatch.setattr(nulls, "_log_bound", lambda form, shape: drawn.append(shape) or 0.0)
    assert quick == [null.p_value(fraction) for fraction in fractions]
    assert len(drawn) >= 20  # all but at most one are on one side of the mean


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_bound_lies_above_the_probability(diagonal, generator):
    mu = torch.linspace(-1.0, 0.6, D, dtype=torch.float64)
    axes = Subspace.random(D, D, generator).basis
    form = mu if diagonal else (axes * mu) @ axes.T
    for shape in (0.5, 2.0):
        q = np.random.default_rng(0).standard_gamma(shape, (20_000, D))
        assert np.log((q @ mu.numpy() > 0).mean()) < nulls._log_bound(form, shape) < 0
    assert nulls._log_bound(form, 200.0) < nulls.CERTAIN


def test_members_of_two_tight_groups_are_more_alike_than_all_other_divisions():
    # Of 6 divisions of four members in two pairs, two are the observed one, by either name.
    similarity = torch.full((4, 4), 0.1)
    similarity[:2, :2] = similarity[2:, 2:] = 0.9
    groups = relabelled(similarity, 2)
    assert (groups.within, groups.between) == (pytest.approx(0.9), pytest.approx(0.1))
    assert groups.p_value == pytest.approx(2 / 6) and groups.divisions == 6
    assert (groups.pairs_within, groups.pairs_between) == (2, 4)
    for first in (1, 3):
        with pytest.raises(ValueError, match="two members or more"):
            relabelled(similarity, first)


@pytest.mark.slow
def test_the_p_value_of_exchangeable_members_is_uniform(generator):
    # 10 divisions of six members that differ in more than names: p is one of 0.1, 0.2, ..., 1.
    p_values = []
    for _ in range(500):
        x = torch.randn(6, 6, generator=generator)
        p_values.append(relabelled(x + x.T, 3).p_value)
    rejected = sum(p <= 0.2 + 1e-9 for p in p_values) / 500
    assert abs(rejected - 0.2) < 4 * (0.2 * 0.8 / 500) ** 0.5


def test_of_many_divisions_some_are_drawn(generator):
    similarity = torch.randn(16, 16, generator=generator)
    similarity = similarity + similarity.T
    similarity[:8, :8] += 9
    similarity[8:, 8:] += 9
    groups = relabelled(similarity, 8)
    assert groups.divisions == 5000 and groups.p_value < 0.002
