"""Intrinsic dimension of a cloud of points, from the distances to their nearest neighbours."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Literal["mle", "twonn"]
DIMENSIONS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 96, 128, 192, 256, 384, 512)  # of the reference
POINTS = 4000  # of the reference in each dimension, in as many clouds as that makes


def distances(points: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Euclidean distances between all points, in fp64, from differences and not from inner products."""
    points = points.double().cpu()
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def dimension(between: Float[Tensor, "n n"], estimator: Estimator, neighbours: int = 30) -> float:
    """Intrinsic dimension of the points with these distances, by scikit-dimension.

    `mle` is Levina & Bickel's from the `neighbours` nearest of every point, local estimates combined by
    their harmonic mean; `twonn` is Facco et al.'s from the nearest two, without the tenth of the points
    whose ratio is largest. Both fall short in high dimensions, where the nearest of few points are far
    away: a Gaussian of 20 dimensions has 14 by `mle` on 500 points. So see `calibrated`.

    Raises:
        ValueError: if there are no more points than neighbours, or if two points are the same.
    """
    check_neighbours(len(between), neighbours)
    nearest = between.topk(max(neighbours, 2) + 1, largest=False).values[:, 1:].numpy()
    if not bool((nearest[:, 0] > 0).all()):
        raise ValueError("two prompts have the same state: the distance to a nearest neighbour is zero")
    return _estimate(nearest, estimator, neighbours)


def check_neighbours(points: int, neighbours: int) -> None:
    """Raise ValueError if a group of so many points is smaller than the neighbourhood needs."""
    if points <= neighbours:
        raise ValueError(
            f"a group of {points} prompts is smaller than a neighbourhood of {neighbours} needs:"
            f" give at least {neighbours + 1}, or lower probe.uncertainty.neighbours"
        )


def _estimate(nearest: np.ndarray, estimator: Estimator, neighbours: int) -> float:
    """The estimate from the distances of every point to its nearest others, in ascending order."""
    from skdim.id import MLE, TwoNN

    if estimator == "twonn":
        return float(TwoNN(dist=True).fit(nearest[:, :2]).dimension_)
    arrays = nearest[:, :neighbours], np.zeros((len(nearest), neighbours), dtype=int)
    # What it takes for points is only checked, as their neighbours are given.
    made = MLE().fit(nearest, precomputed_knn_arrays=arrays, n_neighbors=neighbours, comb="mle")
    return float(made.dimension_)


def calibrated(value: float, points: int, estimator: Estimator, neighbours: int = 30) -> float:
    """The dimension of the Gaussian of which so many points have this estimate, the mean over clouds.

    Source: ours; indirect inference, Gouriéroux et al. (1993), J. Appl. Econometrics 8:S85.
    """
    means = _reference(points, estimator, neighbours if estimator == "mle" else 2)
    return float(np.exp(np.interp(np.log(value), np.log(means), np.log(DIMENSIONS))))


@lru_cache(maxsize=64)
def _reference(points: int, estimator: Estimator, neighbours: int) -> np.ndarray:
    """What the estimate is of Gaussians of `DIMENSIONS`, the mean over clouds; made to rise with them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for d in DIMENSIONS:
        shape = max(2, POINTS // points), points, d
        clouds = torch.randn(shape, generator=generator, dtype=torch.float64)
        nearest = torch.cdist(clouds, clouds).topk(neighbours + 1, largest=False).values[..., 1:]
        found.append(np.mean([_estimate(one.numpy(), estimator, neighbours) for one in nearest]))
    return np.maximum.accumulate(np.array(found) * (1 + 1e-9 * np.arange(len(found))))
