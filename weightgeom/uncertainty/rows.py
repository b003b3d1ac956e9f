"""What tells two groups of prompts apart in the residual stream, and what of it the output sees: as rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.bootstrap import bootstrap_times
from weightgeom.geometry.nulls import beta_null
from weightgeom.geometry.subspace import Subspace
from weightgeom.table import Row, arm_columns, row
from weightgeom.uncertainty.contrast import Contrast, auroc, half_samples, logistic_scores, two_sided
from weightgeom.uncertainty.intrinsic_dimension import Estimator, calibrated, dimension, distances
from weightgeom.uncertainty.sensitivity import (
    Head,
    coupling,
    fisher_sensitivity,
    quadratic_size,
    token_gradients,
)
from weightgeom.uncertainty.topology import Persistence, cosine_distances, persistence

ESTIMATORS: tuple[Estimator, ...] = ("mle", "twonn")
WITHIN = 1.959964  # standard errors of a 95 % interval
START = 0.05  # of the norm of a state: the first size that a sensitivity is tried with
RESAMPLES = 200  # of a bootstrap over prompts


@dataclass(frozen=True)
class Asked:
    """On how much, and against how many, the quantities are taken."""

    neighbours: int
    points: int  # of a group's topology
    thresholds: Sequence[float]  # cosine distances
    resamples: int  # half-samples of an interval
    random: int  # directions
    seed: int


def group_rows(states: Float[Tensor, "prompt d"], arm: Row, asked: Asked) -> Iterator[Row]:
    """Dimension and topology of one group, each with its interval from half-samples.

    A half-sample has as many neighbours as it has points for; its own calibration allows for its size.
    """
    n = len(states)
    yield row("residual_norm", float(states.norm(dim=1).mean()), n=n, **arm, unit="residual")
    between = distances(states)
    halves = half_samples(n, asked.resamples, asked.seed)
    for estimator in ESTIMATORS:
        name, k = f"{estimator}_dimension", asked.neighbours
        value, samples = dimension(between, estimator, k), _halved(between, halves, estimator, k)
        yield from _interval(name, log(value), samples.log(), n, arm, transform=exp)
        value, samples = calibrated(value, n, estimator, k), _calibrated(samples, n // 2, estimator, k)
        yield from _interval(f"{name}_calibrated", log(value), samples.log(), n, arm, transform=exp)
    m = min(n, asked.points)
    apart = cosine_distances(states[:m])
    shapes = [
        persistence(apart[half][:, half]) for half in half_samples(m, min(20, asked.resamples), asked.seed)
    ]
    found, others = shape_of(persistence(apart), m, asked), [shape_of(s, m // 2, asked) for s in shapes]
    for (quantity, threshold), value in found.items():
        samples = torch.tensor([other[quantity, threshold] for other in others], dtype=torch.float64)
        yield from _interval(quantity, value, samples, m, _at_threshold(arm, threshold))


def shape_of(shape: Persistence, points: int, asked: Asked) -> dict[tuple[str, str], float]:
    """Topology by quantity and threshold: components as a share of the points, entropy, longest loop."""
    counts = zip(asked.thresholds, shape.components(asked.thresholds), strict=True)
    shares = {("components", f"{threshold:g}"): count / points for threshold, count in counts}
    return {**shares, ("persistence_entropy", ""): shape.entropy, ("longest_loop", ""): shape.longest_loop}


def shape_rows(
    states: Float[Tensor, "pooled d"], contrast: Contrast, arm: Row, asked: Asked
) -> Iterator[Row]:
    """Dimension and topology of the uncertain group against the factual one, by permutation of labels."""
    n, k = len(states) // 2, asked.neighbours
    between, sides = distances(states), contrast.sides()
    halves = half_samples(n, asked.resamples, asked.seed)
    for estimator in ESTIMATORS:
        values = torch.tensor(
            [[dimension(between[one][:, one], estimator, k) for one in two] for two in sides],
            dtype=torch.float64,
        )
        p = two_sided((values[:, 1] / values[:, 0]).log())
        one, other = values[0].tolist()
        samples = [_halved(between[side][:, side], halves, estimator, k) for side in sides[0]]
        made = [calibrated(value, n, estimator, k) for value in (one, other)]
        better = [_calibrated(some, n // 2, estimator, k) for some in samples]
        for name, value, (low, high) in (
            (f"{estimator}_dimension_ratio", other / one, samples),
            (f"{estimator}_dimension_calibrated_ratio", made[1] / made[0], better),
        ):
            yield from _interval(name, log(value), (high / low).log(), n, arm, transform=exp)
            yield row(f"{name}_p_value", p, n=len(sides) - 1, **arm)
    sides = contrast.sides(asked.points)
    m, apart = sides.shape[2], cosine_distances(states)
    found = [[shape_of(persistence(apart[one][:, one]), m, asked) for one in two] for two in sides]
    for key in found[0][0]:
        differences = torch.tensor([two[1][key] - two[0][key] for two in found], dtype=torch.float64)
        quantity, threshold = key
        at = _at_threshold(arm, threshold)
        # Its spread under the null is that of an estimate: no interval is to be had that assumes less.
        error = float(differences[1:].std()) if len(differences) > 2 else 0.0
        yield from _with_ends(f"{quantity}_difference", differences[0].item(), error, m, at)
        yield row(f"{quantity}_difference_p_value", two_sided(differences), n=len(sides) - 1, **at)


def boundary_rows(states: Float[Tensor, "pooled d"], contrast: Contrast, arm: Row) -> Iterator[Row]:
    """Detectability and amplification: b and the probe from the training half, figures on the other."""
    directions = contrast.boundaries(states)
    train, test = contrast.train[0], contrast.test[0]
    scores = {"projection": states[test] @ directions[0], "logistic": logistic_scores(states, train, test)}
    for name, (low, high) in scores.items():
        found = auroc(low, high)
        yield from _with_ends(
            f"auroc_{name}", found.value, found.stderr, test.shape[1], arm, low=0.0, high=1.0
        )
        yield row(f"auroc_{name}_p_value", found.p_value, n=2 * test.shape[1], **arm)
    values, error = contrast.amplification(states, directions)
    yield from _with_ends("amplification", float(values[0]), error, test.shape[1], arm)
    yield row("amplification_p_value", two_sided(values), n=len(values) - 1, **arm)
    yield row("amplification_permuted", float(values[1:].mean()), n=len(values) - 1, **arm)


def overlap_rows(
    states: Float[Tensor, "pooled d"], contrast: Contrast, spaces: Mapping[str, Subspace], arm: Row, seed: int
) -> Iterator[Row]:
    """Squared fraction of b in each subspace over k/d, 1 being chance, with both nulls."""
    directions = contrast.boundaries(states).double()
    drawn = _resampled_boundaries(states, contrast, seed)
    for name, space in spaces.items():
        d, k = space.basis.shape
        place = {"subspace": name, "k": k, **arm}
        shares = (directions @ space.basis.to(directions)).square().sum(1)
        samples = (drawn @ space.basis.to(drawn)).square().sum(1)
        null = beta_null(k / d, sqrt(2 * k * (d - k) / (d**2 * (d + 2))))
        above, _ = null.tail(float(shares[0])) if k < d else (1.0, None)
        n = contrast.train.shape[2]
        yield from _interval(
            "overlap", float(shares[0]) * d / k, samples * d / k, n, arm, percentiles=True, place=place
        )
        p = two_sided(shares) if k < d else 1.0  # the whole stream holds everything, but for rounding
        yield row("overlap_p_value", p, n=len(shares) - 1, **place)
        yield row("overlap_random_p_value", min(1.0, 2 * min(above, 1 - above)), n=1, **place)
        yield row("overlap_permuted", float(shares[1:].mean()) * d / k, n=len(shares) - 1, **place)
        yield row("overlap_random_sd", null.sd * d / k, n=1, **place)


def output_rows(
    head: Head,
    states: Float[Tensor, "prompt d"],
    directions: Float[Tensor, "arrangement d"],
    output: Float[Tensor, "direction d"],
    tokens: Sequence[int],
    arm: Row,
    asked: Asked,
) -> Iterator[Row]:
    """Fisher sensitivity and coupling along b, against random, permuted and the top output directions.

    `states` are of held-out prompts, and `head` what is behind them; `directions` has b first. Sensitivities
    are per squared share of the states' root mean square norm, so that layers compare.
    """
    n, d = states.shape
    generator = torch.Generator().manual_seed(asked.seed)
    random = torch.nn.functional.normalize(torch.randn(asked.random, d, generator=generator), dim=1)
    norm = float(states.square().sum(1).mean().sqrt())
    with torch.no_grad():
        size, difference = quadratic_size(head, states, directions[0], START * norm)
        logits = head(states)

        def along(some: Float[Tensor, "direction d"]) -> Float[Tensor, "direction prompt"]:
            found = [fisher_sensitivity(head, states, one, size, logits) for one in some]
            return torch.stack(found).double().cpu() * norm**2

        own, controls, best = along(directions), along(random), along(output)
    means, others = own.mean(1), controls.mean(1)
    unit, floor = "nats", 1e-30  # a head that is constant has no ratio
    error = float(own[0].std()) / sqrt(n)
    yield from _with_ends("fisher_sensitivity", float(means[0]), error, n, arm, unit=unit, low=0.0)
    yield row("fisher_sensitivity_random", float(others.mean()), n=len(others), unit=unit, **arm)
    yield row("fisher_sensitivity_random_sd", float(others.std()), n=len(others), unit=unit, **arm)
    yield row("fisher_sensitivity_permuted", float(means[1:].mean()), n=len(means) - 1, unit=unit, **arm)
    yield row("fisher_sensitivity_output", float(best.mean()), n=len(best), unit=unit, **arm)
    yield row("fisher_sensitivity_p_value", two_sided(means), n=len(means) - 1, **arm)
    p = two_sided(torch.cat([means[:1], others]))
    yield row("fisher_sensitivity_random_p_value", p, n=len(others), **arm)
    yield row("fisher_size", size / norm, n=n, **arm)
    if difference < float("inf"):
        yield row("fisher_quadratic_difference", difference, n=n, **arm)
    times = bootstrap_times(n, RESAMPLES, asked.seed).double()
    for name, against in (("ratio", controls), ("output_ratio", best)):
        if float(against.mean()) > floor:
            samples = (times @ own[0]) / (times @ against.mean(0)).clamp(min=floor)
            value = float(means[0] / against.mean())
            yield from _interval(f"fisher_{name}", value, samples, n, arm, percentiles=True)
    gradients = token_gradients(head, states, tokens).double().cpu()
    cosines = coupling(directions.double().cpu(), gradients)
    means, error = cosines.mean(1), float(cosines[0].std()) / sqrt(n)
    yield from _with_ends("gradient_coupling", float(means[0]), error, n, arm)
    yield row("gradient_coupling_p_value", two_sided(means), n=len(means) - 1, **arm)
    draws = torch.nn.functional.normalize(torch.randn(999, d, generator=generator), dim=1).double()
    others = coupling(draws, gradients).mean(1)
    p = two_sided(torch.cat([means[:1], others]))
    yield row("gradient_coupling_random_p_value", p, n=len(others), **arm)
    yield row("gradient_coupling_random_sd", float(others.std()), n=len(others), **arm)


def _at_threshold(arm: Row, threshold: str) -> Row:
    """The columns of a group or of a comparison at a threshold; without one, as they are."""
    return arm_columns(arm["treatment"], threshold, against=arm["against"])


def _halved(
    between: Float[Tensor, "n n"], halves: Sequence[Tensor], estimator: Estimator, neighbours: int
) -> Float[Tensor, " half"]:
    values = [dimension(between[half][:, half], estimator, min(neighbours, len(half) - 1)) for half in halves]
    return torch.tensor(values, dtype=torch.float64)


def _calibrated(
    values: Float[Tensor, " half"], points: int, estimator: Estimator, neighbours: int
) -> Float[Tensor, " half"]:
    found = [calibrated(one, points, estimator, min(neighbours, points - 1)) for one in values.tolist()]
    return torch.tensor(found, dtype=torch.float64)


def _resampled_boundaries(
    states: Float[Tensor, "pooled d"], contrast: Contrast, seed: int
) -> Float[Tensor, "resample d"]:
    """The boundary direction of bootstrap samples of the training prompts of either side."""
    sides = states[contrast.train[0]].double()
    one, other = (
        bootstrap_times(sides.shape[1], RESAMPLES, seed + side).double() @ sides[side] for side in (0, 1)
    )
    return torch.nn.functional.normalize(other - one, dim=1)


def _interval(
    quantity: str,
    value: float,
    samples: Float[Tensor, " sample"],
    n: int,
    arm: Row,
    *,
    transform: Callable[[float], float] | None = None,
    percentiles: bool = False,
    place: Mapping[str, object] | None = None,
) -> Iterator[Row]:
    """A value with the ends of its 95 % interval from resamples.

    By their percentiles, or ± 1.96 of their standard deviation around the value; `transform` is applied to
    the value and to the ends, as of a logarithm.
    """
    spread = float(samples.std()) if len(samples) > 1 else 0.0
    low, high = value - WITHIN * spread, value + WITHIN * spread
    if percentiles and len(samples):
        low, high = (float(samples.double().quantile(end)) for end in (0.025, 0.975))
    if transform is not None:
        value, low, high = transform(value), transform(low), transform(high)
        spread *= value  # to first order
    for name, one, error in (("", value, spread), ("_low", low, None), ("_high", high, None)):
        if len(samples) > 1 or not name:
            yield {**row(f"{quantity}{name}", one, n=n, stderr=error, **arm), **(place or {})}


def _with_ends(
    quantity: str,
    value: float,
    error: float,
    n: int,
    arm: Row,
    *,
    unit: str = "1",
    low: float = -float("inf"),
    high: float = float("inf"),
) -> Iterator[Row]:
    yield row(quantity, value, n=n, stderr=error, **arm, unit=unit)
    yield row(f"{quantity}_low", max(low, value - WITHIN * error), n=n, **arm, unit=unit)
    yield row(f"{quantity}_high", min(high, value + WITHIN * error), n=n, **arm, unit=unit)
