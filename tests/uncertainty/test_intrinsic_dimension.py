import pytest
import torch

from weightgeom.uncertainty.intrinsic_dimension import calibrated, dimension, distances

WIDTH = 128  # of the embedded model's residual stream


def embedded(points, generator):
    """The points in the model's width, isometrically, away from the origin."""
    basis = torch.linalg.qr(torch.randn(WIDTH, points.shape[1], generator=generator, dtype=torch.float64)).Q
    return points.double() @ basis.T + torch.randn(WIDTH, generator=generator)


def manifold(kind, d, n, generator):
    points = torch.randn(n, d + (kind == "sphere"), generator=generator)
    if kind == "ellipsoid":
        points = points * torch.linspace(0.6, 1.4, d)
    return embedded(points if kind != "sphere" else points / points.norm(dim=1, keepdim=True), generator)


@pytest.mark.parametrize("kind", ["gaussian", "ellipsoid", "sphere"])
@pytest.mark.parametrize("d", [2, 5, 10, 20])
def test_the_calibrated_dimension_of_a_manifold_is_its_own_within_a_tenth(kind, d, generator):
    # The sd of TwoNN on n points is some d / √n, 5 % here; the mean of ten clouds has 1.6 %.
    clouds = [distances(manifold(kind, d, 400, generator)) for _ in range(10)]
    for estimator in ("mle", "twonn"):
        raw = [dimension(cloud, estimator) for cloud in clouds]
        assert abs(sum(calibrated(value, 400, estimator) for value in raw) / 10 - d) < 0.1 * d
        if kind == "gaussian" and d <= 5:  # a low dimension needs no calibration
            assert abs(sum(raw) / 10 - d) < 0.1 * d


def test_the_uncalibrated_dimension_underestimates_20(generator):
    between = distances(manifold("gaussian", 20, 500, generator))
    assert 12 < dimension(between, "mle") < 16 and dimension(between, "twonn") < 20


def test_the_dimension_does_not_depend_on_the_unit_of_the_states(generator):
    points = manifold("gaussian", 5, 100, generator)
    for estimator in ("mle", "twonn"):
        in_unit, other = (dimension(distances(scale * points), estimator) for scale in (1, 1000))
        assert abs(in_unit - other) < 1e-9 * in_unit


def test_a_group_smaller_than_its_neighbourhood_is_refused(generator):
    between = distances(torch.randn(30, 4, generator=generator))
    with pytest.raises(
        ValueError, match=r"a group of 30 prompts is too small for probe\.uncertainty\.neighbours=30"
    ):
        dimension(between, "mle", 30)
    assert dimension(between, "mle", 29) > 0


def test_states_that_are_the_same_are_refused(generator):
    points = torch.randn(40, 4, generator=generator)
    points[3] = points[7]
    with pytest.raises(ValueError, match="two prompts have the same state"):
        dimension(distances(points), "twonn")
