"""Likelihoods of the origins of an update, from known ones: Gaussians of one covariance, calibrated."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

if TYPE_CHECKING:
    import pandas as pd

COVERAGE = 0.9  # of the set of origins that fit
INSIDE = 0.99  # share of held-out known updates that lie near enough to some origin
AXES = ("base", "data", "rate")  # the settings that known updates are held out by
PLACE = ("label", *AXES, "step", "model_type", "d_model", "layers", "relative_norm")  # no measurements


@dataclass(frozen=True, eq=False)
class Gaussians:
    """p(measurements | origin) as Gaussians that share a covariance, shrunk after Ledoit and Wolf.

    Measurements are in units of their standard deviation within origins; those that never differ are left
    out. Source: Fisher's linear discriminant; Ledoit & Wolf (2004), J. Multivariate Anal. 88:365.
    """

    labels: tuple[str, ...]
    scale: Float[Array, " measurement"]
    means: Float[Array, "label measurement"]
    precision: Float[Array, "measurement measurement"]

    @classmethod
    def of(cls, measured: Float[Array, "update measurement"], labels: Sequence[str]) -> "Gaussians":
        """The means of every origin and the covariance within origins."""
        from sklearn.covariance import ledoit_wolf

        given = np.asarray(labels)
        names = tuple(sorted(set(labels)))
        means = np.stack([measured[given == name].mean(0) for name in names])
        within = measured - means[np.searchsorted(names, given)]
        spread = within.std(0)
        scale = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1.0), 0.0)
        covariance, _ = ledoit_wolf(within * scale, assume_centered=True)
        return cls(names, scale, means * scale, np.linalg.inv(covariance))

    def distances(self, measured: Float[Array, "update measurement"]) -> Float[Array, "update label"]:
        """The squared Mahalanobis distance to the mean of every origin."""
        apart = (measured * self.scale)[:, None] - self.means
        return np.einsum("uli,ij,ulj->ul", apart, self.precision, apart)


@dataclass(frozen=True, eq=False)
class Judged:
    """The answer about one update.

    `likelihoods` sum to 1 over the known origins, with equal weights beforehand and given that it is one of
    them. `fits` is the set that holds the true origin for nine of ten updates of held-out settings.
    `distance` is that from the nearest origin over the limit: above 1 the update is unlike all known ones.
    """

    likelihoods: Mapping[str, float]
    fits: tuple[str, ...]
    distance: float

    @property
    def outside(self) -> bool:
        """Whether it is unlike all known updates."""
        return self.distance > 1

    @property
    def answer(self) -> str | None:
        """The one origin that fits; None where none or several do, or the update is unlike all known ones."""
        return self.fits[0] if len(self.fits) == 1 and not self.outside else None


@dataclass(frozen=True, eq=False)
class Classifier:
    """Gaussians whose likelihoods, sets and limit are calibrated on settings that were held out.

    Known updates are held out by base, by data and by learning rate, one value at a time, and judged by those
    that remain. `temperature` is the most likely one for these judgements; `threshold` is the conformal
    quantile of 1 - p(true origin), so that the set {origin: 1 - p ≤ threshold} holds the true one in
    `COVERAGE` of them; `limit` is the `INSIDE` quantile of the squared distance to the nearest origin.
    Source: Guo et al. (2017), arXiv:1706.04599; Sadinle, Lei & Wasserman (2019), J. Am. Stat. Assoc. 114:223.
    """

    names: tuple[str, ...]
    gaussians: Gaussians
    temperature: float
    threshold: float
    limit: float

    @classmethod
    def of(cls, known: "pd.DataFrame", names: Sequence[str]) -> "Classifier":
        """Fit to a table of known updates, with the columns `label`, `AXES` and the measurements `names`.

        Raises:
            ValueError: if no setting can be held out.
        """
        from scipy.optimize import minimize_scalar

        measured, labels = known[list(names)].to_numpy(np.float64), known["label"].tolist()
        distances, true, nearest = [], [], []
        order = {name: place for place, name in enumerate(sorted(set(labels)))}
        for held in settings(known):
            rest = known[~held]
            if set(rest["label"]) != set(order):
                continue
            fitted = Gaussians.of(measured[~held], rest["label"].tolist())
            to_origins = fitted.distances(measured[held])
            distances.append(to_origins)
            nearest.append(to_origins.min(1))
            true += [order[name] for name in known["label"][held]]
        if not distances:
            raise ValueError(
                f"no setting can be held out: known updates need two or more values of {', '.join(AXES)}"
            )
        away, own = np.concatenate(distances), np.array(true)

        def surprise(exponent: float) -> float:
            return -float(np.log(_chosen(_likelihoods(away, np.exp(exponent)), own) + 1e-300).mean())

        temperature = float(np.exp(minimize_scalar(surprise, bounds=(-3.0, 8.0), method="bounded").x))
        scores = 1 - _chosen(_likelihoods(away, temperature), own)
        return cls(
            tuple(names),
            Gaussians.of(measured, labels),
            temperature,
            conformal_quantile(scores, COVERAGE),
            conformal_quantile(np.concatenate(nearest), INSIDE),
        )

    def judge(self, measured: "pd.DataFrame") -> list[Judged]:
        """The answers about the updates of a table with the same measurements."""
        distances = self.gaussians.distances(measured[list(self.names)].to_numpy(np.float64))
        labels = self.gaussians.labels
        return [
            Judged(
                dict(zip(labels, map(float, likelihoods), strict=True)),
                tuple(
                    label
                    for label, likelihood in zip(labels, likelihoods, strict=True)
                    if 1 - likelihood <= self.threshold
                ),
                float(np.sqrt(row.min() / self.limit)),
            )
            for row, likelihoods in zip(distances, _likelihoods(distances, self.temperature), strict=True)
        ]


def measurements(known: "pd.DataFrame") -> list[str]:
    """The columns of a table of known updates that are measurements."""
    return [name for name in known.columns if name not in PLACE]


def settings(known: "pd.DataFrame") -> Iterator[Bool[Array, " update"]]:
    """For every value of every axis, which of the updates have it."""
    for axis in AXES:
        values = known[axis].unique()
        if len(values) > 1:
            for value in values:
                yield (known[axis] == value).to_numpy()


def conformal_quantile(scores: Float[Array, " update"], coverage: float) -> float:
    """The ⌈(n + 1) coverage⌉-th smallest score, the largest where there are fewer.

    A new exchangeable score is at most this with probability `coverage` or more.
    """
    ordered = np.sort(scores)
    return float(ordered[min(len(ordered), ceil((len(ordered) + 1) * coverage)) - 1])


def _likelihoods(distances: Float[Array, "update label"], temperature: float) -> Float[Array, "update label"]:
    """Softmax of -distance / 2, softened."""
    logs = -distances / (2 * temperature)
    shares = np.exp(logs - logs.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _chosen(values: Float[Array, "update label"], label: Array) -> Float[Array, " update"]:
    return values[np.arange(len(values)), label]
