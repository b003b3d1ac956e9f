"""Simulations with known truth: nulls that hold, effects that are there, and intervals with their target."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.analysis.evidence import (
    Evidence,
    correlation_over_runs,
    direction,
    equivalence,
    holm,
    rank_correlation,
)
from weightgeom.analysis.rules import CLAIMS, LEVEL, MARGIN
from weightgeom.calibrate.reports import SUBJECTS, false_support
from weightgeom.estimators.moments import Moment
from weightgeom.geometry.bootstrap import bootstrap_interval, widening
from weightgeom.geometry.joint_null import Sketches, Spread
from weightgeom.geometry.nulls import (
    Estimated,
    adapter_moment,
    isotropic_null,
    matched_null,
    moment_root,
    rank_p_value,
    rotation_null,
    spectrum_shares,
)
from weightgeom.geometry.subspace import Subspace
from weightgeom.uncertainty.contrast import auroc

ROWS = 64  # of simulated matrices
SEQUENCE = 32  # tokens that share a component, as those of one text do


@dataclass(frozen=True)
class Rate:
    """The rate of an event in a number of simulations, and its nominal rate.

    `sided` says whether the nominal rate is a limit (`at most`, `at least`) or is to be met (`equal`).
    """

    what: str
    shape: str
    nominal: float | None
    happened: int
    draws: int
    sided: str = "equal"

    @property
    def rate(self) -> float:
        """The share of the simulations."""
        return self.happened / self.draws

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's 99.9 % interval of the rate, as some sixty rates are compared."""
        from scipy.stats import binomtest

        ends = binomtest(self.happened, self.draws).proportion_ci(0.999, "exact")
        return float(ends.low), float(ends.high)

    @property
    def holds(self) -> bool | None:
        """Whether the rate agrees with the nominal one; None for a power, which has none."""
        if self.nominal is None:
            return None
        low, high = self.interval
        return (self.sided == "at least" or low <= self.nominal) and (
            self.sided == "at most" or self.nominal <= high
        )


Simulation = Callable[[torch.Generator, int], Iterator[Rate]]


def rates(draws: int, dimensions: tuple[int, ...], seed: int) -> Iterator[Rate]:
    """All rates, of `draws` simulations each; matrices have the given widths d, with k = d/8.

    Simulations without matrices take next to no time and have ten times as many draws; whole reports half.
    """
    for d in dimensions:
        yield from _rotation(torch.Generator().manual_seed(seed), d, draws)
    for d in dict.fromkeys(min(d, 1024) for d in dimensions):  # wide enough to be sketched
        yield from _joint(torch.Generator().manual_seed(seed), d, draws)
    for simulation in (_matched, _trained, _adapter, _coverage):
        yield from simulation(torch.Generator().manual_seed(seed), min(dimensions), draws)
    generator = np.random.default_rng(seed)
    for over in (_orders, _forecasts):
        yield from over(generator, draws)
    for over in (_ranks, _trainings, _family, _detections):
        yield from over(generator, 10 * draws)
    yield from _reports(torch.Generator().manual_seed(seed), max(1, draws // 2))


def _update(d: int, rank: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    x = torch.randn(ROWS, rank, generator=generator, dtype=torch.float64)
    return x @ torch.randn(rank, d, generator=generator, dtype=torch.float64)


def _spectrum(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The shares of the singular values, from the smaller of the two Gram matrices."""
    n, d = x.shape
    if n >= d:
        return spectrum_shares(x.T @ x)
    return torch.cat([x.new_zeros(d - n), spectrum_shares(x @ x.T)])


def _fraction(x: Float[Tensor, "n d"], space: Subspace) -> float:
    return float((x @ space.basis).square().sum() / x.square().sum())


def _rotation(generator: torch.Generator, d: int, draws: int) -> Iterator[Rate]:
    """Updates whose directions are random, against a fixed subspace; power against one of twice the share."""
    k = d // 8
    space = Subspace.random(d, k, generator)
    for rank in (1, 4, ROWS):
        rejected = detected = 0
        for draw in range(draws):
            x, seed = _update(d, rank, generator), draw if d <= 128 else 0  # draws of wide bases are shared
            null = rotation_null(_spectrum(x), k, seed, 199 if d <= 128 else 999)
            rejected += null.p_value(_fraction(x, space))[0] <= LEVEL
            planted = x + (sqrt(2.0) - 1) * x @ space.basis @ space.basis.T
            null = rotation_null(_spectrum(planted), k, seed, 199 if d <= 128 else 999)
            detected += null.p_value(_fraction(planted, space))[0] <= LEVEL
        shape = f"d {d}, rank {rank}"
        yield Rate("`p_value` (rotation), no structure", shape, LEVEL, rejected, draws)
        yield Rate("`p_value` (rotation), twice the share: power", shape, None, detected, draws)
    rejected = 0
    for _ in range(draws):
        x = torch.randn(ROWS, d, generator=generator, dtype=torch.float64)
        rejected += isotropic_null(d, k, ROWS).p_value(_fraction(x, space))[0] <= LEVEL
    yield Rate("`p_value` (isotropic), Gaussian entries", f"d {d}", LEVEL, rejected, draws)


def _joint(generator: torch.Generator, d: int, draws: int) -> Iterator[Rate]:
    """Eight updates that share two directions, one subspace: of their mean ratio, z and p."""
    k, rejected, beyond = d // 8, 0, 0
    space, sketches = Subspace.random(d, k, generator), Sketches(d, 0)
    for draw in range(draws):
        shared = torch.randn(2, d, generator=generator, dtype=torch.float64)
        updates = []
        for _ in range(8):
            x = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64) @ shared
            x = x + 0.3 * torch.randn(ROWS, d, generator=generator, dtype=torch.float64)
            updates.append(x / x.norm())
        mean = torch.cat(updates) / sqrt(8)  # whose Gram matrix is the mean of theirs
        if len(mean) > d:
            mean = torch.linalg.qr(mean).R
        fraction, seed = _fraction(mean, space), draw if d <= 128 else 0
        null = rotation_null(_spectrum(mean), k, seed, 199 if d <= 128 else 999)
        rejected += null.p_value(fraction)[0] <= LEVEL
        spread = Spread.of(
            [sketches.of_gram(x.T @ x) for x in updates], [sketches.of_space(space)] * 8, sketches, k
        )
        beyond += abs(fraction * d / k - 1) > 3 * spread.sd
    shape = f"d {d}, 8 matrices"
    yield Rate("`ratio_mean_p_value`, shared directions", shape, LEVEL, rejected, draws)
    yield Rate("`ratio_mean_z` beyond ± 3, shared directions", shape, 0.03, beyond, draws, "at most")


def _texts(scale: Float[Tensor, " d"], tokens: int, generator: torch.Generator) -> Float[Tensor, "token d"]:
    sequences = -(-tokens // SEQUENCE)
    common = torch.randn(sequences, len(scale), generator=generator, dtype=torch.float64)
    x = torch.randn(sequences * SEQUENCE, len(scale), generator=generator, dtype=torch.float64)
    return (sqrt(0.7) * x + sqrt(0.3) * common.repeat_interleave(SEQUENCE, 0)) * scale


def _moment(x: Float[Tensor, "token d"], groups: int = 16) -> Moment:
    sequences = x.unflatten(0, (-1, SEQUENCE)).tensor_split(min(groups, len(x) // SEQUENCE))
    flat = [part.flatten(0, 1) for part in sequences]
    return Moment(
        torch.stack([part.T @ part for part in flat]), torch.stack([part.sum(0) for part in flat]),
        torch.tensor([float(len(part)) for part in flat], dtype=torch.float64),
    )  # fmt: skip


def crossfit(
    gram: Float[Tensor, "d d"], moment: Moment, k: int, seed: int, draws: int = 199
) -> tuple[float, float]:
    """p-value and ratio of the cross-fitted fraction over its level, as the probe `rsf` has them."""
    halves = moment.halves()
    assert halves is not None
    null = matched_null(gram, moment.root, moment.top(k), seed, draws)
    resampled = moment.resampled_tops(k, 40, seed)
    assert resampled is not None
    interval = bootstrap_interval(null.mean, resampled.shares.sum(1).tolist(), len(moment.sums))
    assert interval is not None
    error = interval.stderr / null.mean * widening(moment.per_dimension)
    estimated = Estimated(null, error, len(moment.sums) - 1)
    inside = level = 0.0
    for half, other in (halves, halves[::-1]):
        space = Subspace.top(half.value, k)
        inside += space.explained(gram) / 2
        level += space.explained(other.value) / 2
    return estimated.p_value(inside * null.mean / level)[0], inside / level


def _matched(generator: torch.Generator, d: int, draws: int) -> Iterator[Rate]:
    """Updates that read the inputs and are independent of them otherwise, with estimated subspaces."""
    d = min(d, 128)  # the result depends on tokens per dimension
    k, scale = d // 8, torch.arange(1.0, d + 1, dtype=torch.float64).pow(-0.5)
    for per in (2, 16, 64):
        high = low = 0
        for draw in range(draws):
            moment = _moment(_texts(scale, per * d, generator))
            x = torch.randn(4 * ROWS, d, generator=generator, dtype=torch.float64) * scale
            p, _ = crossfit(x.T @ x, moment, k, draw)
            high += p <= LEVEL
            low += p > 1 - LEVEL
        shape = f"d {d}, {per} tokens per dimension"
        yield Rate("`matched_p_value` ≤ 0.05, independent", shape, LEVEL, high, draws, "at most")
        yield Rate("`matched_p_value` > 0.95, independent", shape, 3 * LEVEL, low, draws, "at most")


def trained(
    gram: Float[Tensor, "d d"], moment: Moment, space: Subspace, seed: int, draws: int = 199
) -> float:
    """p-value against the level of trained inputs in a subspace of other text, as the probe `rsf` has it."""
    null = matched_null(gram, moment.root, space, seed, draws)
    drawn = [space.explained(drawn_moment) for drawn_moment in moment.resampled(40, seed)]
    interval = bootstrap_interval(null.mean, drawn, len(moment.sums))
    assert interval is not None
    estimated = Estimated(null, interval.stderr / null.mean, len(moment.sums) - 1)
    return estimated.p_value(space.explained(gram))[0]


def _trained(generator: torch.Generator, d: int, draws: int) -> Iterator[Rate]:
    """Updates that read the trained inputs and are independent of them otherwise; other held-out text."""
    d = min(d, 128)
    k, scale = d // 8, torch.arange(1.0, d + 1, dtype=torch.float64).pow(-0.5)
    for per in (2, 16):
        high = low = 0
        for draw in range(draws):
            heldout = scale[torch.randperm(d, generator=generator)]
            space = _moment(_texts(heldout, 64 * d, generator)).top(k)
            moment = _moment(_texts(scale, per * d, generator))
            x = torch.randn(4 * ROWS, d, generator=generator, dtype=torch.float64) * scale
            p = trained(x.T @ x, moment, space, draw)
            high += p <= LEVEL
            low += p > 1 - LEVEL
        shape = f"d {d}, {per} trained tokens per dimension"
        yield Rate("`trained_matched_p_value` ≤ 0.05, independent", shape, LEVEL, high, draws, "at most")
        yield Rate("`trained_matched_p_value` > 0.95, independent", shape, LEVEL, low, draws, "at most")


def _adapter(generator: torch.Generator, d: int, draws: int) -> Iterator[Rate]:
    """LoRA updates B A: B random, and B a sum of gradients times A, for inputs with a known moment."""
    d = min(d, 128)
    k, rank, scale = d // 8, 8, torch.arange(1.0, d + 1, dtype=torch.float64).pow(-0.5)
    space, moment = Subspace.top(scale.square().diag(), k), scale.square().diag()
    isotropic = matched = plain = 0
    for draw in range(draws):
        a = torch.randn(rank, d, generator=generator, dtype=torch.float64) / sqrt(rank)
        x = torch.randn(ROWS, rank, generator=generator, dtype=torch.float64) @ a
        null = matched_null(x.T @ x, moment_root(a.T @ a), space, draw, 199)
        isotropic += null.p_value(space.explained(x.T @ x))[0] <= LEVEL
        x = (torch.randn(ROWS, d, generator=generator, dtype=torch.float64) * scale) @ a.T @ a
        null = matched_null(x.T @ x, moment_root(adapter_moment(a, moment)), space, draw, 199)
        matched += null.p_value(space.explained(x.T @ x))[0] <= LEVEL
        null = matched_null(x.T @ x, moment_root(moment), space, draw, 199)
        plain += null.p_value(space.explained(x.T @ x))[0] > 1 - LEVEL
    shape = f"d {d}, LoRA of rank {rank}"
    yield Rate("`adapter_p_value`, random B", shape, LEVEL, isotropic, draws)
    yield Rate("`matched_p_value` of an adapter, independent", shape, LEVEL, matched, draws)
    yield Rate("the plain matched level, p > 0.95 (not used for adapters)", shape, None, plain, draws)


def _coverage(generator: torch.Generator, d: int, draws: int) -> Iterator[Rate]:
    """The 95 % interval of a ratio over prompts, for the share in the subspace of endless text."""
    d = min(d, 64)
    k, scale = d // 8, torch.arange(1.0, d + 1, dtype=torch.float64).pow(-0.7)
    truth = Subspace.top(scale.square().diag(), k)
    for per in (1, 4, 16, 64):
        covered = 0
        for draw in range(draws):
            moment = _moment(_texts(scale, max(2 * SEQUENCE, per * d), generator))
            x = torch.randn(ROWS, d, generator=generator, dtype=torch.float64) * scale
            gram = x.T @ x
            resampled = moment.resampled_tops(k, 40, draw)
            assert resampled is not None
            drawn = resampled.explained(gram)[:, -1].tolist()
            value = moment.top(k).explained(gram)
            interval = bootstrap_interval(value, drawn, len(moment.sums), moment.per_dimension)
            assert interval is not None
            covered += interval.low <= truth.explained(gram) <= interval.high
        shape = f"d {d}, {per} tokens per dimension"
        yield Rate("`ratio_low` to `ratio_high` covers", shape, 0.9, covered, draws, "at least")


def _ranks(generator: np.random.Generator, draws: int) -> Iterator[Rate]:
    for controls in (19, 39):
        sample = torch.from_numpy(generator.normal(size=(draws, controls + 1)))
        rejected = sum(rank_p_value(row[0], row[1:]) <= LEVEL for row in sample)
        yield Rate("p by rank among controls", f"{controls} controls", LEVEL, rejected, draws)


def _trainings(generator: np.random.Generator, draws: int) -> Iterator[Rate]:
    """Directions and equivalences over trainings: at the bound, and where they hold."""
    for n in (2, 3, 5):
        noise = 0.05 * generator.normal(size=(draws, n))
        at = [direction(list(row)) for row in noise]
        yield _rate("direction, no difference: supported", f"{n} trainings", LEVEL / 2, at)
        ends = [equivalence(list(log(MARGIN) + row), log(MARGIN)) for row in noise]
        yield _rate("equivalence, at the margin: supported", f"{n} trainings", LEVEL, ends, "at most")
        there = [direction(list(log(1.5) + row)) for row in noise]
        yield _rate("direction, a factor of 1.5: power", f"{n} trainings", None, there)
        same = [equivalence(list(row), log(MARGIN)) for row in noise]
        yield _rate("equivalence, equal: power", f"{n} trainings", None, same)


def _rate(
    what: str, shape: str, nominal: float | None, evidence: list[Evidence | None], sided: str = "equal"
) -> Rate:
    happened = sum(result is not None and result.p_for <= LEVEL for result in evidence)
    return Rate(what, shape, nominal, happened, len(evidence), sided)


def _orders(generator: np.random.Generator, draws: int) -> Iterator[Rate]:
    """The graded control: eight objectives whose ratios have nothing to do with their alternatives."""
    import pandas as pd

    rejected = 0
    for _ in range(draws):
        x, y = (np.repeat(generator.normal(size=8), 3) for _ in range(2))
        table = pd.DataFrame({
            "run": np.repeat(np.arange(8), 3), "seed": np.tile(np.arange(3), 8),
            "sharpness": x + 0.05 * generator.normal(size=24), "ratio": y + 0.2 * generator.normal(size=24),
        })  # fmt: skip
        rejected += rank_correlation(table)[1] <= LEVEL
    yield Rate("rank correlation over objectives", "8 objectives, 3 seeds", LEVEL, rejected, draws)


def _forecasts(generator: np.random.Generator, draws: int) -> Iterator[Rate]:
    """Forecast and measured ratio without relation, four fifths of their variance between trainings."""
    for n in (3, 6):
        evidence = []
        for _ in range(draws):
            x, y = (
                sqrt(0.8) * np.repeat(generator.normal(size=n), 8) + sqrt(0.2) * generator.normal(size=8 * n)
                for _ in range(2)
            )
            evidence.append(correlation_over_runs(x, y, [str(run) for run in np.repeat(np.arange(n), 8)]))
        shape = f"{n} trainings, 8 points each"
        yield _rate("correlation over trainings: supported", shape, LEVEL / 2, evidence, "at most")


def _family(generator: np.random.Generator, draws: int) -> Iterator[Rate]:
    """Any claim supported on noise, with one test for each claim, or three, at the bound of each."""
    for tests in (1, 3):
        false = 0
        for _ in range(draws):
            p_values = []
            for _ in range(tests * len(CLAIMS)):
                row = list(0.05 * generator.normal(size=3))
                made = direction(row) if generator.random() < 0.7 else equivalence(
                    [log(MARGIN) + value for value in row], log(MARGIN)
                )  # fmt: skip
                p_values.append(1.0 if made is None else made.p_for)
            false += min(holm(p_values)) <= LEVEL
        shape = f"{tests * len(CLAIMS)} tests, 3 trainings"
        yield Rate("any false `supported` of a report (Holm)", shape, LEVEL, false, draws, "at most")


def _detections(generator: np.random.Generator, draws: int) -> Iterator[Rate]:
    for n in (20, 50):
        sample = torch.from_numpy(generator.normal(size=(draws, 2, n)))
        rejected = sum(auroc(low, high).p_value <= LEVEL for low, high in sample)
        yield Rate("AUROC's p-value, no difference", f"{n} prompts a side", LEVEL, rejected, draws)


def _reports(generator: torch.Generator, draws: int) -> Iterator[Rate]:
    """Whole studies whose alignment, graded control, forecasts and edits have none of the claimed effects."""
    for truth, subject in SUBJECTS.items():
        happened = false_support(truth, draws, 3, generator)
        what = f"any false `supported` of a whole report: {subject}"
        yield Rate(what, "5 objectives, 3 seeds", LEVEL, happened, draws, "at most")
