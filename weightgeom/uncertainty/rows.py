"""Table rows on two prompt groups: their differences in the residual stream, and the effect on the output."""

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
from weightgeom.uncertainty.contrast import (
    Contrast,
    auroc,
    best_of_layers,
    half_samples,
    logistic_scores,
    two_sided,
)
from weightgeom.uncertainty.intrinsic_dimension import Estimator, calibrated, dimension, distances
from weightgeom.uncertainty.sensitivity import (
    Readout,
    coupling,
    fisher_sensitivity,
    quadratic_size,
    token_gradients,
)
from weightgeom.uncertainty.topology import Persistence, cosine_distances, persistence

ESTIMATORS: tuple[Estimator, ...] = ("mle", "twonn")
STDERRS_OF_95 = 1.959964  # standard errors of a 95 % interval
START_SIZE = 0.05  # of a state's norm: the first perturbation size tried for a sensitivity
BOOTSTRAP_RESAMPLES = 200  # bootstrap samples over prompts


@dataclass(frozen=True)
class EstimateSettings:
    """Sample sizes and numbers of controls of the estimates."""

    neighbours: int  # of each point, for the dimension
    points: int  # of each group, for the topology
    thresholds: Sequence[float]  # cosine distances
    resamples: int  # half-samples for an interval
    random: int  # number of random directions
    seed: int


def group_rows(states: Float[Tensor, "prompt d"], arm: Row, settings: EstimateSettings) -> Iterator[Row]:
    """Dimension and topology of one group, each with an interval from half-samples.

    A half-sample too small for `neighbours` uses all its points; it is calibrated for its own size.
    """
    n = len(states)
    yield row("residual_norm", float(states.norm(dim=1).mean()), n=n, **arm, unit="residual")
    between = distances(states)
    halves = half_samples(n, settings.resamples, settings.seed)
    for estimator in ESTIMATORS:
        name, k = f"{estimator}_dimension", settings.neighbours
        value, samples = dimension(between, estimator, k), _halved(between, halves, estimator, k)
        yield from _resampled_interval_rows(name, log(value), samples.log(), n, arm, transform=exp)
        value, samples = calibrated(value, n, estimator, k), _calibrated(samples, n // 2, estimator, k)
        yield from _resampled_interval_rows(
            f"{name}_calibrated", log(value), samples.log(), n, arm, transform=exp
        )
    m = min(n, settings.points)
    apart = cosine_distances(states[:m])
    shapes = [
        persistence(apart[half][:, half])
        for half in half_samples(m, min(20, settings.resamples), settings.seed)
    ]
    whole, parts = shape_of(persistence(apart), m, settings), [shape_of(s, m // 2, settings) for s in shapes]
    for (quantity, threshold), value in whole.items():
        samples = torch.tensor([part[quantity, threshold] for part in parts], dtype=torch.float64)
        yield from _resampled_interval_rows(quantity, value, samples, m, _at_threshold(arm, threshold))


def shape_of(shape: Persistence, points: int, settings: EstimateSettings) -> dict[tuple[str, str], float]:
    """Topology by quantity and threshold: components per point, persistence entropy, longest loop."""
    counts = zip(settings.thresholds, shape.components(settings.thresholds), strict=True)
    shares = {("components", f"{threshold:g}"): count / points for threshold, count in counts}
    return {**shares, ("persistence_entropy", ""): shape.entropy, ("longest_loop", ""): shape.longest_loop}


def shape_rows(
    states: Float[Tensor, "pooled d"], contrast: Contrast, arm: Row, settings: EstimateSettings
) -> Iterator[Row]:
    """Dimension and topology of the uncertain group compared with the factual one, by permuted labels."""
    n, k = len(states) // 2, settings.neighbours
    between, sides = distances(states), contrast.sides()
    halves = half_samples(n, settings.resamples, settings.seed)
    for estimator in ESTIMATORS:
        values = torch.tensor(
            [[dimension(between[side][:, side], estimator, k) for side in pair] for pair in sides],
            dtype=torch.float64,
        )
        p = two_sided((values[:, 1] / values[:, 0]).log())
        factual, uncertain = values[0].tolist()
        samples = [_halved(between[side][:, side], halves, estimator, k) for side in sides[0]]
        corrected = [calibrated(value, n, estimator, k) for value in (factual, uncertain)]
        corrected_samples = [_calibrated(sample, n // 2, estimator, k) for sample in samples]
        for name, value, (below, above) in (
            (f"{estimator}_dimension_ratio", uncertain / factual, samples),
            (f"{estimator}_dimension_calibrated_ratio", corrected[1] / corrected[0], corrected_samples),
        ):
            ratios = (above / below).log()
            yield from _resampled_interval_rows(name, log(value), ratios, n, arm, transform=exp)
            yield row(f"{name}_p_value", p, n=len(sides) - 1, **arm)
    sides = contrast.sides(settings.points)
    m, apart = sides.shape[2], cosine_distances(states)
    shapes = [[shape_of(persistence(apart[side][:, side]), m, settings) for side in pair] for pair in sides]
    for key in shapes[0][0]:
        differences = torch.tensor(
            [uncertain[key] - factual[key] for factual, uncertain in shapes], dtype=torch.float64
        )
        quantity, threshold = key
        at = _at_threshold(arm, threshold)
        # The spread under the null serves as the standard error: it assumes no more than the permutations do.
        error = float(differences[1:].std()) if len(differences) > 2 else 0.0
        yield from _normal_interval_rows(f"{quantity}_difference", differences[0].item(), error, m, at)
        yield row(f"{quantity}_difference_p_value", two_sided(differences), n=len(sides) - 1, **at)


def boundary_rows(states: Float[Tensor, "pooled d"], contrast: Contrast, arm: Row) -> Iterator[Row]:
    """Detectability and amplification of b: fitted on the training half, evaluated on the test half."""
    directions = contrast.boundaries(states)
    train, test = contrast.train[0], contrast.test[0]
    scores = {"projection": states[test] @ directions[0], "logistic": logistic_scores(states, train, test)}
    for name, (low, high) in scores.items():
        area, n = auroc(low, high), test.shape[1]
        yield row(f"auroc_{name}", area.value, n=n, stderr=area.stderr, **arm)
        yield row(f"auroc_{name}_low", area.low, n=n, **arm)
        yield row(f"auroc_{name}_high", area.high, n=n, **arm)
        yield row(f"auroc_{name}_p_value", area.p_value, n=2 * n, **arm)
    values, error = contrast.amplification(states, directions)
    yield from _normal_interval_rows("amplification", float(values[0]), error, test.shape[1], arm)
    yield row("amplification_p_value", two_sided(values), n=len(values) - 1, **arm)
    yield row("amplification_permuted", float(values[1:].mean()), n=len(values) - 1, **arm)


def best_layer_rows(
    aurocs: Mapping[int, Mapping[str, Float[Tensor, " arrangement"]]], arm: Row
) -> Iterator[Row]:
    """P-values of the layers' AUROC among the best layers of permuted labels, by layer and probe."""
    for name in next(iter(aurocs.values())):
        values = torch.stack([of_layer[name] for of_layer in aurocs.values()])
        for layer, p in zip(aurocs, best_of_layers(values).tolist(), strict=True):
            yield row(f"auroc_{name}_max_p_value", p, n=values.shape[1] - 1, layer=layer, **arm)


def overlap_rows(
    states: Float[Tensor, "pooled d"], contrast: Contrast, spaces: Mapping[str, Subspace], arm: Row, seed: int
) -> Iterator[Row]:
    """Squared fraction of b inside each subspace over k/d (1 is chance), with both nulls."""
    directions = contrast.boundaries(states).double()
    drawn = _resampled_boundaries(states, contrast, seed)
    for name, space in spaces.items():
        d, k = space.basis.shape
        place = {"subspace": name, "k": k, **arm}
        shares = (directions @ space.basis.to(directions)).square().sum(1)
        samples = (drawn @ space.basis.to(drawn)).square().sum(1)
        null = beta_null(k / d, sqrt(2 * k * (d - k) / (d**2 * (d + 2))))
        above, _ = null.p_value(float(shares[0]))
        n = contrast.train.shape[2]
        yield from _resampled_interval_rows(
            "overlap", float(shares[0]) * d / k, samples * d / k, n, arm, percentiles=True, place=place
        )
        p = two_sided(shares) if k < d else 1.0  # k = d contains everything, up to rounding
        yield row("overlap_p_value", p, n=len(shares) - 1, **place)
        yield row("overlap_random_p_value", min(1.0, 2 * min(above, 1 - above)), n=1, **place)
        yield row("overlap_permuted", float(shares[1:].mean()) * d / k, n=len(shares) - 1, **place)
        yield row("overlap_random_sd", null.sd * d / k, n=1, **place)


def output_rows(
    readout: Readout,
    states: Float[Tensor, "prompt d"],
    directions: Float[Tensor, "arrangement d"],
    output: Float[Tensor, "direction d"],
    tokens: Sequence[int],
    arm: Row,
    settings: EstimateSettings,
) -> Iterator[Row]:
    """Fisher sensitivity and coupling along b, compared with random, permuted and top output directions.

    `states` are those of held-out prompts, and `readout` maps them to logits; b comes first in `directions`.
    Sensitivities are per squared share of the states' root mean square norm, which makes layers comparable.
    """
    n, d = states.shape
    generator = torch.Generator().manual_seed(settings.seed)
    random = torch.nn.functional.normalize(torch.randn(settings.random, d, generator=generator), dim=1)
    norm = float(states.square().sum(1).mean().sqrt())
    with torch.no_grad():
        size, difference = quadratic_size(readout, states, directions[0], START_SIZE * norm)
        logits = readout(states)

        def along(tested: Float[Tensor, "direction d"]) -> Float[Tensor, "direction prompt"]:
            sensitivities = [
                fisher_sensitivity(readout, states, direction, size, logits) for direction in tested
            ]
            return torch.stack(sensitivities).double().cpu() * norm**2

        own, controls, best = along(directions), along(random), along(output)
    means, others = own.mean(1), controls.mean(1)
    unit, floor = "nats", 1e-30  # a constant readout has no ratio
    error = float(own[0].std()) / sqrt(n)
    yield from _normal_interval_rows("fisher_sensitivity", float(means[0]), error, n, arm, unit=unit, low=0.0)
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
    times = bootstrap_times(n, BOOTSTRAP_RESAMPLES, settings.seed).double()
    for name, against in (("ratio", controls), ("output_ratio", best)):
        if float(against.mean()) > floor:
            samples = (times @ own[0]) / (times @ against.mean(0)).clamp(min=floor)
            value = float(means[0] / against.mean())
            yield from _resampled_interval_rows(f"fisher_{name}", value, samples, n, arm, percentiles=True)
    gradients = token_gradients(readout, states, tokens).double().cpu()
    cosines = coupling(directions.double().cpu(), gradients)
    means, error = cosines.mean(1), float(cosines[0].std()) / sqrt(n)
    yield from _normal_interval_rows("gradient_coupling", float(means[0]), error, n, arm)
    yield row("gradient_coupling_p_value", two_sided(means), n=len(means) - 1, **arm)
    draws = torch.nn.functional.normalize(torch.randn(999, d, generator=generator), dim=1).double()
    others = coupling(draws, gradients).mean(1)
    p = two_sided(torch.cat([means[:1], others]))
    yield row("gradient_coupling_random_p_value", p, n=len(others), **arm)
    yield row("gradient_coupling_random_sd", float(others.std()), n=len(others), **arm)


def _at_threshold(arm: Row, threshold: str) -> Row:
    """The columns of a group or a comparison, at a threshold if one is given."""
    return arm_columns(arm["treatment"], threshold, against=arm["against"])


def _halved(
    between: Float[Tensor, "n n"], halves: Sequence[Tensor], estimator: Estimator, neighbours: int
) -> Float[Tensor, " half"]:
    values = [dimension(between[half][:, half], estimator, min(neighbours, len(half) - 1)) for half in halves]
    return torch.tensor(values, dtype=torch.float64)


def _calibrated(
    values: Float[Tensor, " half"], points: int, estimator: Estimator, neighbours: int
) -> Float[Tensor, " half"]:
    corrected = [
        calibrated(value, points, estimator, min(neighbours, points - 1)) for value in values.tolist()
    ]
    return torch.tensor(corrected, dtype=torch.float64)


def _resampled_boundaries(
    states: Float[Tensor, "pooled d"], contrast: Contrast, seed: int
) -> Float[Tensor, "resample d"]:
    """The boundary directions of bootstrap samples of each side's training prompts."""
    sides = states[contrast.train[0]].double()
    factual, uncertain = (
        bootstrap_times(sides.shape[1], BOOTSTRAP_RESAMPLES, seed + side).double() @ sides[side]
        for side in (0, 1)
    )
    return torch.nn.functional.normalize(uncertain - factual, dim=1)


def _resampled_interval_rows(
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

    The ends are percentiles of the samples, or the value ± 1.96 of their standard deviations. `transform` is
    applied to the value and both ends, for example exp to logarithms.
    """
    spread = float(samples.std()) if len(samples) > 1 else 0.0
    low, high = value - STDERRS_OF_95 * spread, value + STDERRS_OF_95 * spread
    if percentiles and len(samples):
        low, high = (float(samples.double().quantile(end)) for end in (0.025, 0.975))
    if transform is not None:
        value, low, high = transform(value), transform(low), transform(high)
        spread *= value  # to first order
    for suffix, number, error in (("", value, spread), ("_low", low, None), ("_high", high, None)):
        if len(samples) > 1 or not suffix:
            yield {**row(f"{quantity}{suffix}", number, n=n, stderr=error, **arm), **(place or {})}


def _normal_interval_rows(
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
    yield row(f"{quantity}_low", max(low, value - STDERRS_OF_95 * error), n=n, **arm, unit=unit)
    yield row(f"{quantity}_high", min(high, value + STDERRS_OF_95 * error), n=n, **arm, unit=unit)
