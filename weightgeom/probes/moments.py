"""The mechanism: the ratio that the moments of a base predict under an objective, beside the trained one."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.analysis.summaries import by_expectation
from weightgeom.bases.outline import Shape
from weightgeom.declarations import MECHANISM, ProbeDeclaration
from weightgeom.estimators.gradients import Gathering, MeanGradient, Pass, folded, gradient_moments
from weightgeom.estimators.moments import GIB, Moment
from weightgeom.estimators.reference_subspaces import (
    Frame,
    Inputs,
    check_dimensions,
    dimensions,
    input_frames,
    place_of,
    prediction_frame,
)
from weightgeom.estimators.updates import update_of
from weightgeom.geometry.bootstrap import bootstrap_interval
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.params import Params
from weightgeom.table import Row, own, row

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Moments:
    """Predicted, forecast and measured relative subspace fraction of an objective's update.

    The subspaces are those of the probe `rsf` at the trajectory's start, from held-out text. The
    moments are taken there too, once, on training examples. What a trained update has in excess of
    the prediction comes of what is read depending on what is sent back. Source: the mechanism offered
    by arXiv:2605.16600; these figures are ours. Nothing is measured where the objective is not known
    or the start is random.

    Quantities:
        predicted_ratio: the ratio if the two were independent and averaged out, from C_a (read) or
            C_delta (write) alone.
        mean_ratio: the ratio of the mean E[a] (read) or E[δ] (write) alone, which is what independence
            leads to as samples add up: E[δ aᵀ] = E[δ] E[a]ᵀ.
        forecast_ratio: the ratio of the mean gradient G = E[δ aᵀ]: a single step of plain descent. As
            predicted_ratio it has the bootstrap's standard error over prompts, and predicted_ratio_low,
            ..._high, forecast_ratio_low, ..._high are the ends of the 95 % intervals.
        measured_ratio: the ratio of the update at this step.
        read_predicted_correlation, read_mean_..., read_forecast_..., write_...: Pearson's correlation
            with the measured ratio over layers and matrices of one role, at the smallest k.
    """

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration(
        headline="measured_ratio", section=MECHANISM, by_layer=False, compares=False, needs_objective=True
    )

    k: int | list[int] | None = None
    prompts: int = Field(default=2048, ge=2)  # of training examples: G has less noise the more there are
    batch_size: int = Field(default=16, ge=1)  # examples
    positions: Literal["scored", "all"] = "scored"  # those whose next token the objective scores, or all
    centre: bool = False  # the moments
    unit: Literal["token", "prompt"] = "token"  # what a sample is: a token, or a prompt with its responses
    precision: Literal["float32", "float64"] = "float32"  # of the sums
    tokens: int = Field(default=8192, ge=2)  # of held-out text, for the inputs' subspaces
    length: int = Field(default=96, ge=2)  # tokens a sequence
    resamples: int = Field(default=40, ge=0)  # of the bootstrap over prompts; 0: no intervals
    groups: int = Field(default=16, ge=2)  # of prompts, which the bootstrap draws
    budget_gb: float | None = Field(default=None, gt=0)  # GiB for the sums; None: no limit

    def check(self, architecture: Architecture) -> None:
        """Refuse a k that does not fit."""
        check_dimensions(self.k, architecture.d_model, "probe.moments.k")

    def held(self, shape: Shape, objective: bool) -> float:
        """The sums over each group of prompts: of moments and, in full size, of gradients."""
        groups = self.groups if self.resamples else 1
        size = {"float32": 1, "float64": 2}[self.precision] * groups
        in_layers = shape.weights - 2 * shape.logits(shape.d_model)  # without embedding and unembedding
        sums = size * (4 * shape.layers * shape.square + max(in_layers, 0.0)) if objective else 0.0
        if self.budget_gb is not None:
            sums = min(sums, max(self.budget_gb * GIB, sums / shape.layers))
        models = shape.weights * (2 if objective and shape.reference else 1)
        return models + sums + shape.passing(2 * self.batch_size * shape.longest)

    def summary(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """Predicted, forecast and measured ratio, and the correlations."""
        return by_expectation(table, ("predicted", "forecast"))

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """Expected against measured ratio."""
        from weightgeom.figures.base import expected_and_measured

        table = tables.get("training")
        if table is None or not len(own(table, "measured_ratio")):
            return {}
        return {"mechanism": expected_and_measured(table)}

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint's update since the trajectory's start."""
        if setting.objective is None or setting.from_random:
            return lambda params: []
        dims = dimensions(self.k, setting.model.architecture.d_model)
        spaces = {frame.place: frame.space for frame in self._frames(setting, dims[-1])}
        expected = list(self._expected(setting, spaces))

        def measure(params: Params) -> list[Row]:
            rows: list[Row] = []
            for matrix in setting.model.architecture.matrices:
                update = update_of(matrix, params, setting.start)
                if update.norm > 0:
                    inside = spaces[place_of(matrix)].shares(update.gram.cpu()).cumsum(0)
                    n = update.shape[0] * update.shape[1]
                    for k in dims:
                        ratio = float(inside[k - 1]) * len(update.gram) / k
                        rows.append(row("measured_ratio", ratio, n=n, **_at(matrix, k)))
            if not rows:
                return []
            return [*expected, *rows, *_correlations([*expected, *rows], dims[0])]

        return measure

    def _frames(self, setting: Setting, k: int) -> Iterator[Frame]:
        inputs = Inputs(tokens=self.tokens, length=self.length, budget_gb=self.budget_gb)
        for frame in input_frames(setting, setting.start, k, inputs):
            yield Frame(frame.place, frame.space)  # without its moment
        yield prediction_frame(setting, setting.start, k)

    def _expected(self, setting: Setting, spaces: dict) -> Iterator[Row]:
        """Rows of what the moments at the start lead to expect, a pass at a time."""
        assert setting.objective is not None and setting.training is not None
        gathering = Gathering(
            prompts=self.prompts,
            positions=self.positions,
            centre=self.centre,
            unit=self.unit,
            dtype=DTYPES[self.precision],
            groups=self.groups if self.resamples else 1,
            batch_size=self.batch_size,
            budget_gb=self.budget_gb,
        )
        passes = gradient_moments(
            *(setting.model, setting.start, setting.objective, setting.training, setting.examples),
            *(gathering, setting.seed),
        )
        for some in passes:
            for matrix in setting.model.architecture.matrices:
                if matrix.layer in some.layers:
                    space = spaces[place_of(matrix)]
                    moment = _moment(matrix, some, setting.start)
                    yield from self._ratios("predicted_ratio", matrix, moment, moment.samples, space, setting)
                    for k in dimensions(self.k, len(space.basis)):
                        mean = moment.mean.cpu()[None]
                        if not mean.any():
                            continue
                        ratio = space.first(k).relative_fraction(mean)
                        yield row("mean_ratio", ratio, n=moment.samples, **_at(matrix, k))
                    grams = _Grams(matrix, some.gradients[matrix.parameter], setting.start)
                    yield from self._ratios("forecast_ratio", matrix, grams, some.prompts, space, setting)

    def _ratios(
        self,
        quantity: str,
        matrix: ResidualMatrix,
        source: "Moment | _Grams",
        n: int,
        space: Subspace,
        setting: Setting,
    ) -> Iterator[Row]:
        d, second = space.basis.shape[0], source.value.cpu()
        if not float(second.trace()) > 0:  # no gradient reaches the matrix: no share of it lies anywhere
            return
        inside = space.shares(second).cumsum(0)
        drawn = [
            space.shares(one).cumsum(0)
            for one in (one.cpu() for one in source.resampled(self.resamples, setting.seed))
            if float(one.trace()) > 0
        ]
        for k in dimensions(self.k, d):
            scale = d / k
            value = float(inside[k - 1])
            interval = bootstrap_interval(value, [float(one[k - 1]) for one in drawn], len(source.sums))
            stderr = None if interval is None else interval.stderr * scale
            yield row(quantity, value * scale, n=n, stderr=stderr, **_at(matrix, k))
            if interval is not None:
                yield row(f"{quantity}_low", max(0.0, interval.low) * scale, n=n, **_at(matrix, k))
                yield row(f"{quantity}_high", min(1.0, interval.high) * scale, n=n, **_at(matrix, k))


class _Grams:
    """Gram matrices of a matrix's mean gradient on its residual side, the gain behind it folded in."""

    def __init__(self, matrix: ResidualMatrix, gradient: MeanGradient, start: Params) -> None:
        self.matrix, self.gradient, self.start = matrix, gradient, start
        self.sums = gradient.sums  # as many as there are groups

    @property
    def value(self) -> Float[Tensor, "d d"]:
        """That of the gradient of the mean loss."""
        return self._gram(self.gradient.value)

    def resampled(self, resamples: int, seed: int) -> Iterator[Float[Tensor, "d d"]]:
        """Those of bootstrap samples of the prompts."""
        for gradient in self.gradient.resampled(resamples, seed):
            yield self._gram(gradient)

    def _gram(self, stored: Tensor) -> Float[Tensor, "d d"]:
        gradient = self.matrix.of({self.matrix.parameter: stored})
        if self.matrix.norm is not None:
            gradient = self.matrix.norm.gain(self.start).to(gradient)[:, None] * gradient
        x = gradient if self.matrix.role == "read" else gradient.T
        return x.T @ x


def _moment(matrix: ResidualMatrix, some: Pass, start: Params) -> Moment:
    """C_a at what a reading matrix reads, or C_delta at what a writing one writes."""
    if matrix.role == "write":
        return folded(some.upstream[matrix.name], matrix, start)
    (moment,) = (
        moment for site, moment in some.inputs.items() if (site.name, site.layer) == place_of(matrix)
    )
    return moment


def _at(matrix: ResidualMatrix, k: int) -> dict:
    return {**matrix.table_columns, "subspace": place_of(matrix)[0], "k": k}


def _correlations(rows: list[Row], k: int) -> Iterator[Row]:
    """Pearson's correlations of what was expected with what was measured, where they are defined."""
    for role in ("read", "write"):
        by_quantity: dict[str, dict[tuple, float]] = {}
        for one in rows:
            if one["role"] == role and one["k"] == k:
                place = one["layer"], one["matrix"], one["expert"]
                by_quantity.setdefault(one["quantity"], {})[place] = one["value"]
        measured = by_quantity.get("measured_ratio", {})
        for name in ("predicted", "mean", "forecast"):
            expected = by_quantity.get(f"{name}_ratio", {})
            pairs = torch.tensor(
                [[expected[place], measured[place]] for place in measured if place in expected],
                dtype=torch.float64,
            )
            if len(pairs) > 2 and bool((pairs.std(0) > 0).all()):
                correlation = float(torch.corrcoef(pairs.T)[0, 1])
                yield row(f"{role}_{name}_correlation", correlation, n=len(pairs), role=role, k=k)
