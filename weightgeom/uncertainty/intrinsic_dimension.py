"""Intrinsic dimension of a cloud of points, from the distances to their nearest neighbours."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Literal["mle", "twonn"]
# Dimensions of the Gaussian reference clouds, and the total number of reference points in each dimension.
DIMENSIONS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 96, 128, 192, 256, 384, 512)
POINTS = 4000


def distances(points: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Euclidean distances between all points, in fp64, by differences instead of inner products."""
    points = points.double().cpu()
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def dimension(between: Float[Tensor, "n n"], estimator: Estimator, neighbours: int = 30) -> float:
    """Intrinsic dimension of points from their pairwise distances, by scikit-dimension.

    `mle` is Levina & Bickel's estimator on the `neighbours` nearest neighbours of every point, with local
    estimates combined by their harmonic mean; `twonn` is Facco et al.'s on the two nearest, without the
    tenth of the points with the largest ratio. Both are biased downwards in high dimensions, where the
    nearest neighbours of few points are far away: `mle` gives 14 for 500 points of a 20-dimensional
    Gaussian. `calibrated` corrects this bias.

    Raises:
        ValueError: if the number of points does not exceed `neighbours`, or if two points coincide.
    """
    check_neighbours(len(between), neighbours)
    nearest = between.topk(max(neighbours, 2) + 1, largest=False).values[:, 1:].numpy()
    if not bool((nearest[:, 0] > 0).all()):
        raise ValueError(
            "two prompts have the same state, at distance zero: remove duplicate prompts from data.groups"
        )
    return _estimate_from_neighbours(nearest, estimator, neighbours)


def check_neighbours(points: int, neighbours: int) -> None:
    """Raise ValueError if a group of `points` prompts has no `neighbours` neighbours for each of them."""
    if points <= neighbours:
        raise ValueError(
            f"a group of {points} prompts is too small for probe.uncertainty.neighbours={neighbours}:"
            f" give at least {neighbours + 1} prompts per group, or lower probe.uncertainty.neighbours"
        )


def _estimate_from_neighbours(nearest: np.ndarray, estimator: Estimator, neighbours: int) -> float:
    """The estimate from every point's distances to its nearest neighbours, in ascending order."""
    from skdim.id import MLE, TwoNN

    if estimator == "twonn":
        return float(TwoNN(dist=True).fit(nearest[:, :2]).dimension_)
    arrays = nearest[:, :neighbours], np.zeros((len(nearest), neighbours), dtype=int)
    # With the neighbours precomputed, MLE only validates its first argument, the points.
    fitted = MLE().fit(nearest, precomputed_knn_arrays=arrays, n_neighbors=neighbours, comb="mle")
    return float(fitted.dimension_)


def calibrated(value: float, points: int, estimator: Estimator, neighbours: int = 30) -> float:
    """The dimension of a Gaussian for which `points` points give the estimate `value` on average.

    Source: ours; indirect inference, Gouriéroux et al. (1993), J. Appl. Econometrics 8:S85.
    """
    means = _gaussian_estimates(points, estimator, neighbours if estimator == "mle" else 2)
    return float(np.exp(np.interp(np.log(value), np.log(means), np.log(DIMENSIONS))))


@lru_cache(maxsize=64)
def _gaussian_estimates(points: int, estimator: Estimator, neighbours: int) -> np.ndarray:
    """Mean estimates over clouds of Gaussian points in each of `DIMENSIONS`, forced to be increasing."""
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for d in DIMENSIONS:
        shape = max(2, POINTS // points), points, d
        clouds = torch.randn(shape, generator=generator, dtype=torch.float64)
        nearest = torch.cdist(clouds, clouds).topk(neighbours + 1, largest=False).values[..., 1:]
        values = [_estimate_from_neighbours(cloud.numpy(), estimator, neighbours) for cloud in nearest]
        estimates.append(np.mean(values))
    return np.maximum.accumulate(np.array(estimates) * (1 + 1e-9 * np.arange(len(estimates))))
