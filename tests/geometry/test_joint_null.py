"""The joint null against rotations that are drawn, and against the null of one matrix."""

from math import sqrt

import pytest
import torch

from weightgeom.geometry import joint_null
from weightgeom.geometry.joint_null import Sketches, Spread
from weightgeom.geometry.nulls import rotation_null, spectrum_shares
from weightgeom.geometry.subspace import Subspace

D, K = 24, 4


def grams(d: int, shared: int, count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Gram matrices of updates that share `shared` strong directions."""
    common = 3 * torch.randn(shared, d, generator=generator)
    grams = []
    for _ in range(count):
        mixed = torch.randn(8, shared, generator=generator) @ common
        update = mixed + torch.randn(8, d, generator=generator)
        grams.append(update.T @ update)
    return grams


def spread(grams: list[torch.Tensor], spaces: list[Subspace], seed: int = 0) -> Spread:
    sketches = Sketches(len(grams[0]), seed)
    made = [sketches.of_gram(gram) for gram in grams], [sketches.of_space(space) for space in spaces]
    return Spread.of(*made, sketches, spaces[0].basis.shape[1])


def drawn_sd(
    grams: list[torch.Tensor], spaces: list[Subspace], draws: int, generator: torch.Generator
) -> float:
    """Of the mean ratio, by Haar rotations of all updates at once."""
    d, k = spaces[0].basis.shape
    gaussian = torch.randn(draws, d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    rotations = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    means = torch.zeros(draws, dtype=torch.float64)
    for gram, space in zip(grams, spaces, strict=True):
        turned = rotations.mT @ space.basis
        shares = torch.einsum("nik,ij,njk->n", turned, gram.double() / gram.trace(), turned)
        means += shares * d / k / len(grams)
    return float(means.std())


@pytest.mark.parametrize("one_subspace", [True, False])
@pytest.mark.parametrize("shared", [1, 6])
def test_the_sd_is_that_of_drawn_rotations_of_the_whole_update(one_subspace, shared, generator) -> None:
    updates = grams(D, shared, 5, generator)
    spaces = [Subspace.random(D, K, generator) for _ in updates]
    if one_subspace:
        spaces = [spaces[0]] * len(updates)
    null = spread(updates, spaces)
    assert null.stderr is None
    assert null.sd == pytest.approx(drawn_sd(updates, spaces, 4000, generator), rel=0.05)


def test_of_one_matrix_it_is_the_rotation_nulls(generator) -> None:
    (gram,), space = grams(D, 2, 1, generator), Subspace.random(D, K, generator)
    null = rotation_null(spectrum_shares(gram), K, seed=0)
    assert spread([gram], [space]).sd == pytest.approx(null.sd * D / K, rel=1e-4)


def test_equal_updates_vary_as_one_and_unrelated_places_as_if_independent(generator) -> None:
    gram, space = grams(D, 1, 1, generator)[0], Subspace.random(D, K, generator)
    sd = spread([gram], [space]).sd
    assert spread([gram] * 9, [space] * 9).sd == pytest.approx(sd, rel=1e-4)
    # Directions of their own in the same subspace: orthogonal rank-one updates are slightly exclusive.
    lines = [torch.eye(D)[:, [n]] @ torch.eye(D)[[n]] for n in range(9)]
    single = spread(lines[:1], [space]).sd
    assert spread(lines, [space] * 9).sd == pytest.approx(single / 3 * sqrt(1 - 8 / (D - 1)), rel=1e-4)


def test_sketches_of_many_dimensions_are_near_the_exact_sd_and_state_their_error(
    generator, monkeypatch
) -> None:
    d = 320
    updates = grams(d, 3, 6, generator)
    spaces = [Subspace.random(d, 40, generator) for _ in range(2)] * 3
    sketched = [spread(updates, spaces, seed) for seed in range(6)]
    monkeypatch.setattr(joint_null, "SKETCH", d)
    exact = spread(updates, spaces)
    assert exact.stderr is None
    for null in sketched:
        assert null.sd == pytest.approx(exact.sd, rel=0.1)
        assert null.stderr is not None and 0 < null.stderr < 0.1 * null.sd
    errors = torch.tensor([null.sd - exact.sd for null in sketched])
    stated = torch.tensor([null.stderr for null in sketched])
    assert errors.square().mean().sqrt() < 3 * stated.square().mean().sqrt()
