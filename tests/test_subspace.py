import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from weightgeom.subspace import Subspace, prediction_moment

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


@pytest.mark.parametrize("fold_gain", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_the_prediction_subspace_is_that_of_an_svd_of_the_unembedding(generator, fold_gain, centre):
    # More rows than the 8192 that are taken at a time, and a mean that matters.
    unembedding = torch.randn(8300, D, generator=generator) + torch.randn(D, generator=generator)
    gain = 1 + torch.rand(D, generator=generator)
    moment = prediction_moment(unembedding, gain, fold_gain=fold_gain, centre=centre)

    rows = unembedding.double().numpy() * (gain.double().numpy() if fold_gain else 1)
    rows = rows - rows.mean(0) if centre else rows
    _, singular, right = np.linalg.svd(rows, full_matrices=False)
    assert_close(moment.numpy(), rows.T @ rows, rtol=1e-9, atol=1e-7)
    # Every right singular vector, strongest first, up to its sign.
    overlap = np.abs(right @ Subspace.top(moment, D).basis.numpy())
    assert_close(overlap, np.eye(D), rtol=0, atol=1e-6)
    assert np.all(np.diff(singular) < 0)


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_that_does_not_fit_is_refused(generator, k):
    message = "a subspace of 4 dimensions has no -?[0-9]+-dimensional part: k must be 1 to 4"
    with pytest.raises(ValueError, match=message):
        Subspace.random(4, k, generator)
    with pytest.raises(ValueError, match=message):
        Subspace.top(torch.eye(4), k)
    with pytest.raises(ValueError, match=message):
        Subspace(torch.eye(6)[:, :4]).first(k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_second_moment_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="no subspace of a second moment with entries that are not finite"):
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
