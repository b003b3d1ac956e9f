from math import sqrt

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from weightgeom.estimators.alignment import ENERGY, NULLS, aligned, leading, overlap, pooled, top_right


def drawn(d_out, d_in, rank, generator):
    left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, d_in, generator=generator, dtype=torch.float64)


def quantities(a, b):
    first, second = leading(a), leading(b)
    assert first is not None and second is not None
    return pooled([aligned(first, second)])


def test_an_update_is_aligned_with_itself_and_opposite_to_its_negative(generator):
    a = drawn(8, 12, 3, generator)
    alignment = quantities(a, -2 * a)
    assert alignment["cosine"] == pytest.approx(-1) and alignment["orthogonal_share"] == pytest.approx(
        0, abs=1e-6
    )
    assert alignment["mode_overlap"] == pytest.approx(1)
    assert ENERGY <= alignment["alignment_ratio"] ** 2 <= 1


def test_a_worked_example():
    # A = diag(3, 4, 0), B = diag(0, 12, 1): <A, B> = 48, ‖A‖ = 5, ‖B‖ = √145. 144/145 of B's energy is in its
    # first direction, which holds 16/25 of A's; 95 % of A's takes both of its directions.
    a, b = (torch.tensor(line, dtype=torch.float64).diag() for line in ([3.0, 4, 0], [0.0, 12, 1]))
    alignment = quantities(a, b)
    assert alignment["cosine"] == pytest.approx(48 / (5 * sqrt(145)))
    assert alignment["orthogonal_share"] == pytest.approx(sqrt(1 - 48**2 / (25 * 145)))
    assert alignment["alignment_ratio"] == pytest.approx(0.8)
    assert alignment["mode_overlap"] == pytest.approx(1) and alignment[
        "null_mode_overlap_mean"
    ] == pytest.approx(2 / 3)
    assert alignment["null_cosine_sd"] == pytest.approx(1 / 3)


def test_the_quantities_are_those_of_numpy(generator):
    pairs = [(drawn(8, 12, 3, generator), drawn(8, 12, 5, generator)) for _ in range(2)]
    inner = energy_a = energy_b = inside = 0.0
    overlaps = []
    for a, b in pairs:
        a, b = a.numpy(), b.numpy()
        inner += (a * b).sum()
        energy_a += np.linalg.norm(a) ** 2
        energy_b += np.linalg.norm(b) ** 2
        bases = []
        for x in (a, b):
            left, values, right = np.linalg.svd(x)
            k = np.argmax(np.cumsum(values**2) >= ENERGY * (values**2).sum()) + 1
            bases.append((left[:, :k], right[:k].T))
        inside += np.linalg.norm(bases[1][0] @ bases[1][0].T @ a) ** 2
        smaller = min(bases[0][1].shape[1], bases[1][1].shape[1])
        overlaps.append(np.linalg.norm(bases[0][1].T @ bases[1][1]) ** 2 / smaller)
    parts = []
    for a, b in pairs:
        first, second = leading(a), leading(b)
        assert first is not None and second is not None
        parts.append(aligned(first, second))
    alignment = pooled(parts)
    assert alignment["cosine"] == pytest.approx(inner / sqrt(energy_a * energy_b))
    assert alignment["alignment_ratio"] == pytest.approx(sqrt(inside / energy_a))
    assert alignment["mode_overlap"] == pytest.approx(np.mean(overlaps))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 4])
def test_every_null_has_the_mean_and_the_spread_of_random_rotations(generator, rank):
    updates = [(drawn(10, 14, rank, generator), drawn(10, 14, 3, generator)) for _ in range(2)]
    state = np.random.default_rng(0)
    draws = []
    for _ in range(500):
        parts = []
        for a, b in updates:
            left, right = (torch.from_numpy(ortho_group.rvs(d, random_state=state)) for d in (10, 14))
            first, second = leading(a), leading(left @ b @ right)
            assert first is not None and second is not None
            parts.append(aligned(first, second))
        draws.append(pooled(parts))
    for name in NULLS:
        values = np.array([numbers[name] for numbers in draws])
        mean, sd = draws[0][f"null_{name}_mean"], draws[0][f"null_{name}_sd"]
        assert abs(values.mean() - mean) < 4 * sd / sqrt(500), name
        # The standard deviation of 500 draws varies by some 1 / √1000 of it, and by half more in skew laws.
        assert abs(values.std(ddof=1) / sd - 1) < 0.15, name
        assert np.mean(np.abs(values - mean) > 2 * sd) < 0.1, name


def test_top_directions_stop_at_the_rank(generator):
    space = top_right(drawn(8, 12, 3, generator), 5)
    assert space is not None and space.shape == (12, 3)
    assert overlap(space, space)[0] == pytest.approx(1) and overlap(space, space)[1] == 0.25
    assert top_right(torch.zeros(3, 4), 2) is None and leading(torch.zeros(3, 4)) is None


def test_a_share_of_all_energy_takes_all_directions(generator):
    whole = leading(drawn(6, 9, 6, generator), 1.0)
    assert whole is not None and whole.left.shape == (6, 6)
    alignment = aligned(whole, whole)
    assert alignment.inside == pytest.approx(1) and alignment.inside_variance == 0
