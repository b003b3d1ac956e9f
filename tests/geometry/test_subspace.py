import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from weightgeom.geometry.subspace import Subspace, eigenpairs, prediction_moment

D, K = 24, 6
DRAWS = 600


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def cases(draw_from):
    """A subspace, a matrix, and the generator that drew them."""
    d = draw_from(st.integers(1, 12))
    k, n = draw_from(st.integers(1, d)), draw_from(st.integers(1, 8))
    generator = draw(draw_from(st.integers(0, 10_000)))
    space = Subspace.random(d, k, generator)
    return space, torch.randn(n, d, generator=generator, dtype=torch.float64), generator


def test_an_update_planted_inside_the_subspace_has_the_ratio_d_over_k(generator):
    space = Subspace.random(D, K, generator)
    inside = torch.randn(10, K, generator=generator, dtype=torch.float64) @ space.basis.T
    assert_close(space.fraction(inside), 1.0)
    assert_close(space.relative_fraction(inside), D / K)


def test_an_update_planted_outside_the_subspace_has_the_ratio_0(generator):
    space = Subspace.random(D, K, generator)
    x = torch.randn(10, D, generator=generator, dtype=torch.float64)
    outside = x - x @ space.basis @ space.basis.T
    # Squared rounding: (1e-16)² relative, with room.
    assert space.relative_fraction(outside) < 1e-28


def test_the_fraction_of_a_matrix_in_a_coordinate_plane():
    x = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    # 3² / (3² + 4²) = 0.36 in the first two of three coordinates; over 2/3 that is 0.54
    space = Subspace(torch.eye(3, dtype=torch.float64)[:, :2])
    assert_close(space.fraction(x), 0.36)
    assert_close(space.relative_fraction(x), 0.54)


@given(cases())
def test_rotating_the_basis_changes_nothing(case):
    space, x, generator = case
    k = space.basis.shape[1]
    rotated = Subspace(space.basis @ Subspace.random(k, k, generator).basis)
    # Two sums of at most 12 · 12 fp64 products, each good to 1e-16.
    assert_close(rotated.fraction(x), space.fraction(x), rtol=1e-12, atol=1e-12)
    moment = x.T @ x
    assert_close(rotated.explained(moment), space.explained(moment), rtol=1e-12, atol=1e-12)


@given(cases(), st.floats(1e-6, 1e6))
def test_the_fraction_lies_between_0_and_1_whatever_the_scale(case, scale):
    space, x, _ = case
    assert -1e-12 <= space.fraction(x) <= 1 + 1e-12
    assert_close(space.fraction(scale * x), space.fraction(x))


@given(cases())
def test_the_fraction_and_that_of_the_complement_add_up_to_1(case):
    space, x, _ = case
    d, k = space.basis.shape
    if k < d:
        whole = torch.linalg.qr(space.basis, mode="complete").Q
        assert_close(space.fraction(x) + Subspace(whole[:, k:]).fraction(x), 1.0)
    else:
        assert_close(space.fraction(x), 1.0)


@given(cases())
def test_the_fraction_of_a_matrix_is_the_explained_share_of_its_second_moment(case):
    space, x, _ = case
    assert_close(space.explained(x.T @ x), space.fraction(x), rtol=1e-10, atol=1e-12)


@given(cases())
def test_random_subspaces_have_an_orthonormal_basis(case):
    space, _, _ = case
    eye = torch.eye(space.basis.shape[1], dtype=torch.float64)
    assert_close(space.basis.T @ space.basis, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_fraction_of_gaussian_noise_follows_its_beta(generator, side):
    d_out, d_in = (D, 10) if side == "left" else (10, D)
    space = Subspace.random(D, K, generator)
    noise = torch.randn(DRAWS, d_out, d_in, generator=generator)
    fractions = [space.fraction(dW.T if side == "left" else dW) for dW in noise]
    assert stats.kstest(fractions, stats.beta(K * 10 / 2, (D - K) * 10 / 2).cdf).pvalue > 0.01


def test_the_fraction_of_a_rank_1_update_over_random_subspaces_follows_its_beta(generator):
    u, v = torch.randn(10, generator=generator), torch.randn(D, generator=generator)
    dW = torch.outer(u, v)
    fractions = [Subspace.random(D, K, generator).fraction(dW) for _ in range(DRAWS)]
    assert stats.kstest(fractions, stats.beta(K / 2, (D - K) / 2).cdf).pvalue > 0.01


def test_the_top_subspace_has_the_strongest_directions_first(generator):
    axes = Subspace.random(D, D, generator).basis
    moment = axes @ torch.arange(1.0, D + 1, dtype=torch.float64).diag() @ axes.T
    top = Subspace.top(moment, 3)
    # The eigenvalues are 24, 23, 22, ...; the sign of an eigenvector is free.
    assert_close((top.basis.T @ axes).abs(), torch.eye(D, dtype=torch.float64)[[23, 22, 21]])
    assert_close(top.explained(moment), (24 + 23 + 22) / (24 * 25 / 2))


def test_the_first_k_of_a_top_subspace_are_the_smaller_top_subspace(generator):
    x = torch.randn(50, D, generator=generator)
    larger, smaller = Subspace.top(x.T @ x, 9), Subspace.top(x.T @ x, 4)
    assert_close(larger.first(4).basis, smaller.basis)


STEP = torch.cat([torch.linspace(1, 0.9, 12), torch.linspace(0.82, 0, 288)])
SPECTRA = {
    "power law": torch.arange(1.0, 301).pow(-1),
    "outlier": torch.cat([torch.tensor([1e4]), torch.arange(2.0, 301).pow(-1)]),
    "low rank": torch.cat([torch.arange(20.0, 0, -1), torch.zeros(280)]),
    "one step": STEP,
    "one step, minute": 1e-20 * STEP,  # second moments of gradients
}


def symmetric(eigenvalues, generator, dtype=torch.float64):
    """A matrix with these eigenvalues and random axes."""
    axes = Subspace.random(len(eigenvalues), len(eigenvalues), generator).basis
    product = (axes * eigenvalues.double()) @ axes.T
    return ((product + product.T) / 2).to(dtype)


def without_eigh(monkeypatch):
    def refuse(*_):
        raise AssertionError("eigh was called")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_solvers_agree_where_the_spectrum_has_a_gap(name, dtype, generator, monkeypatch):
    moment, k = symmetric(SPECTRA[name], generator, dtype), 12
    full = Subspace.top(moment, k, solver="full").basis
    without_eigh(monkeypatch)
    iterative = Subspace.top(moment, k, solver="iterative").basis
    # Residuals of 1e-7 λ_12 over a gap of at least λ_12 - λ_13 = λ_12/13 make angles below 1.3e-6.
    assert float(torch.linalg.matrix_norm(full @ full.T - iterative @ iterative.T, 2)) < 1e-5
    # Strongest first, each vector its own, up to its sign.
    assert_close((full.T @ iterative).abs(), torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.linspace(1, 0.5, 200),
        torch.ones(200),
        torch.cat([torch.full((40,), 3.0), torch.linspace(2.9, 0.1, 160)]),  # more than k equal ones on top
        torch.cat([torch.linspace(9, 3, 10), torch.full((90,), 2.0), torch.ones(100)]),
        torch.cat([torch.ones(5), torch.zeros(195)]),  # rank below k
    ],
    ids=["flat", "identity", "equal at the top", "equal at k", "rank below k"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_solvers_explain_as_much_where_the_spectrum_has_no_gap(eigenvalues, dtype, generator):
    moment = symmetric(eigenvalues, generator, dtype)
    full, iterative = (Subspace.top(moment, 20, solver=solver) for solver in ("full", "iterative"))
    # An asymmetry that the check lets through is below 1e-6 of the largest eigenvalue, of 20 in at least 20.
    assert_close(iterative.explained(moment), full.explained(moment), rtol=1e-6, atol=0)
    eye = torch.eye(20, dtype=torch.float64)
    assert_close(iterative.basis.T @ iterative.basis, eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("eigenvalues", "k"),
    [
        (1 - torch.linspace(0, 1, 300) ** 4, 3),  # does not converge
        (torch.cat([torch.full((40,), 3.0), torch.linspace(2.9, 0.1, 160)]), 20),  # misses directions
        (torch.zeros(30), 2),
        (torch.arange(30.0), 30),
    ],
    ids=["no convergence", "missed", "zero", "k = d"],
)
def test_the_iterative_solver_falls_back_to_the_full_one(eigenvalues, k, generator):
    moment = symmetric(eigenvalues, generator)
    full, iterative = (Subspace.top(moment, k, solver=solver) for solver in ("full", "iterative"))
    assert torch.equal(iterative.basis, full.basis)


def test_the_iterative_solver_gives_the_same_basis_every_time(generator):
    moment = symmetric(SPECTRA["power law"], generator)
    first, second = (Subspace.top(moment, 12, solver="iterative").basis for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("k", [75, 76])  # a quarter of all, and more
def test_a_few_pairs_are_the_last_of_all(k, generator):
    moment = symmetric(torch.arange(1.0, 301.0), generator)
    values, vectors = eigenpairs(moment)
    largest, top = eigenpairs(moment, k)
    assert_close(largest, values[-k:])
    # Neighbours are 1 apart, and errors of fp64 at a norm of 300 about 1e-13.
    assert_close((top.T @ vectors[:, -k:]).abs(), torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["full", "iterative"])
def test_only_the_lower_triangle_of_a_moment_is_read(solver, generator):
    moment = symmetric(SPECTRA["power law"], generator)
    whole, lower = (Subspace.top(symmetric, 12, solver=solver).basis for symmetric in (moment, moment.tril()))
    assert torch.equal(whole, lower)


@pytest.mark.parametrize(("d", "k", "iterative"), [(1024, 64, True), (1024, 65, False), (1023, 16, False)])
def test_the_iterative_solver_is_taken_where_it_is_faster_and_not_for_small_models(
    d, k, iterative, generator, monkeypatch
):
    # Axes of a product of reflections I - 2 v vᵀ, cheaper than a QR of this size.
    v = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    mirror = torch.eye(d, dtype=torch.float64) - 2 * torch.outer(v, v)
    moment = mirror @ torch.arange(1.0, d + 1, dtype=torch.float64).pow(-1).diag() @ mirror
    expected = Subspace.top(moment, k, solver="iterative" if iterative else "full").basis
    if iterative:
        without_eigh(monkeypatch)
    assert torch.equal(Subspace.top(moment, k).basis, expected)


@pytest.mark.parametrize("fold_gain", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_the_prediction_subspace_is_that_of_an_svd_of_the_unembedding(generator, fold_gain, centre):
    # More rows than the 2048 that are taken at a time, and a mean that matters.
    unembedding = torch.randn(8300, D, generator=generator) + torch.randn(D, generator=generator)
    gain = 1 + torch.rand(D, generator=generator)
    moment = prediction_moment(unembedding, gain, fold_gain=fold_gain, centre=centre)

    rows = unembedding.double().numpy() * (gain.double().numpy() if fold_gain else 1)
    rows = rows - rows.mean(0) if centre else rows
    _, singular, right = np.linalg.svd(rows, full_matrices=False)
    # Products of 2048 rows in fp32: 1e-6 of the diagonal.
    assert_close(moment.numpy(), rows.T @ rows, rtol=1e-5, atol=1e-6 * float(np.trace(rows.T @ rows)) / D)
    # Every right singular vector, strongest first, up to its sign.
    overlap = np.abs(right @ Subspace.top(moment, D).basis.numpy())
    assert_close(overlap, np.eye(D), rtol=0, atol=1e-3)  # neighbouring singular values are 1 % apart
    assert np.all(np.diff(singular) < 0)


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_that_does_not_fit_is_refused(generator, k):
    message = "k must be between 1 and 4, the number of dimensions, got -?[0-9]+"
    with pytest.raises(ValueError, match=message):
        Subspace.random(4, k, generator)
    with pytest.raises(ValueError, match=message):
        Subspace.top(torch.eye(4), k)
    with pytest.raises(ValueError, match=message):
        Subspace(torch.eye(6)[:, :4]).first(k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_second_moment_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="with entries that are not finite has no top subspace"):
        Subspace.top(torch.tensor([[1.0, bad], [bad, 1.0]]), 1)


def test_the_share_of_nothing_is_refused(generator):
    space = Subspace.random(4, 2, generator)
    message = "the share of an all-zero matrix inside a subspace is undefined"
    with pytest.raises(ValueError, match=message):
        space.fraction(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        space.relative_fraction(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="the explained share of a second moment with zero trace"):
        space.explained(torch.zeros(4, 4))
