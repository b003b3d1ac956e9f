from math import log, pi

import pytest
import torch
from torch.testing import assert_close

from weightgeom.uncertainty.intrinsic_dimension import distances
from weightgeom.uncertainty.topology import cosine_distances, persistence


@pytest.mark.parametrize("clusters", [1, 3, 7])
def test_the_planted_clusters_are_found(clusters, generator):
    centres = torch.linalg.qr(torch.randn(128, clusters, generator=generator)).Q.T
    points = centres.repeat(15, 1) + 0.01 * torch.randn(15 * clusters, 128, generator=generator)
    # Noise of norm 0.01 √128 = 0.11 on unit centres: cosine distances of 0.012 within, of 1 between.
    components = persistence(cosine_distances(points)).components([0.0, 0.15, 0.5, 1.5])
    assert components == [15 * clusters, clusters, clusters, 1]


def test_a_circle_has_one_long_loop_and_a_disk_has_only_short_ones(generator):
    angles = 2 * pi * torch.arange(42) / 42
    basis = torch.linalg.qr(torch.randn(128, 2, generator=generator, dtype=torch.float64)).Q
    circle = torch.stack([angles.cos(), angles.sin()], 1).double() @ basis.T
    loops_of_circle = persistence(distances(circle))
    # Born at the side of a regular 42-gon, 2 sin(π/42) = 0.149; it dies at the side of a triangle, √3.
    assert len(loops_of_circle.loops) == 1
    assert_close(
        loops_of_circle.loops[0], torch.tensor([0.149, 3**0.5], dtype=torch.float64), rtol=0.01, atol=0
    )
    disk = torch.rand(60, 1, generator=generator).sqrt() * torch.nn.functional.normalize(
        torch.randn(60, 2, generator=generator)
    )
    assert persistence(distances(disk)).longest_loop < 0.5 < 1.5 < loops_of_circle.longest_loop


def test_the_entropy_of_equal_lifetimes_is_1_and_of_one_that_outlives_all_nearly_0():
    line = torch.arange(10.0)[:, None]
    assert_close(persistence(distances(line)).entropy, 1.0)
    far = torch.cat([line / 1000, line[:1] + 100])
    assert persistence(distances(far)).entropy < 0.1
    # Lifetimes 1 and 3: -(1/4 ln 1/4 + 3/4 ln 3/4) / ln 2 = 0.8113
    three = persistence(distances(torch.tensor([[0.0], [1.0], [4.0]])))
    assert_close(three.entropy, (log(4) / 4 + 0.75 * log(4 / 3)) / log(2))


def test_without_loops_the_components_are_the_same(generator):
    between = cosine_distances(torch.randn(30, 8, generator=generator))
    with_loops, other = persistence(between), persistence(between, loops=False)
    assert torch.equal(with_loops.merges, other.merges) and len(other.loops) == 0 and other.longest_loop == 0


def test_a_state_of_zero_is_refused(generator):
    points = torch.randn(5, 4, generator=generator)
    points[2] = 0
    with pytest.raises(ValueError, match="a state is all zero"):
        cosine_distances(points)
