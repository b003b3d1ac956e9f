"""The mechanism: the ratio that the moments of a base predict under an objective, and the trained one."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.analysis.summaries import by_expectation
from weightgeom.bases.outline import Shape
from weightgeom.declarations import MECHANISM, ProbeDeclaration
from weightgeom.estimators.gradients import (
    Gathering,
    MeanGradient,
    Pass,
    folded,
    gradient_moments,
    prompts_at_once,
)
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
from weightgeom.estimators.updates import adapter_of, update_of
from weightgeom.geometry.bootstrap import bootstrap_interval
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Objective, Setting
from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.params import Params
from weightgeom.table import Row, arm_columns, own, row
from weightgeom.text.examples import Examples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

EXPECTED = (
    *("predicted", "mean", "mixture"),
    *("forecast", "forecast_adam", "forecast_kronecker", "forecast_adapter"),
)
SHOWN = ("predicted", "forecast", "forecast_adam")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})  # an objective is checked by its members
class Moments:
    """Predicted, forecast and measured relative subspace fraction of an objective's update.

    The subspaces are those of the probe `rsf` at the trajectory's start, from held-out text; of experts those
    of all tokens of their layer. The moments are taken there too, once, on training examples. The excess of a
    trained update over the prediction is due to the dependence of inputs and upstream gradients. Source: the
    mechanism offered by arXiv:2605.16600; these figures are ours. Nothing is measured where the start is
    random, or where the objective is not known and none is given.

    A given `objective` stands for that of trajectories without one: of two checkpoints, or of a chain, where
    its moments at the first stage are compared with the update of every stage, and those at each stage with
    the update of the next. A stage that another objective trained is then no test of the mechanism.

    Quantities:
        predicted_ratio: the ratio if the two were independent and averaged out, from C_a (read) or
            C_delta (write) alone.
        mean_ratio: the ratio of the mean E[a] (read) or E[δ] (write) alone, the limit under independence
            as samples add up: E[δ aᵀ] = E[δ] E[a]ᵀ.
        mixture_ratio: the ratio of C + (N - 1) ρ μ μᵀ, which lies between the two: the expectation under
            independence for N samples, ρ = ‖E[x]‖² / E‖x‖² of the other factor (δ for a read, a for a write)
            without its bias, μ the mean of this one.
        forecast_ratio: the ratio of the mean gradient G = E[δ aᵀ]: a single step of plain descent.
        forecast_adam_ratio: the ratio of G over the root of the mean squared gradient of a training batch,
            entry by entry as the parameter is stored: a single step of Adam once its running means have
            settled. Its intervals hold the divisor fixed.
        forecast_kronecker_ratio: the ratio of D_δ^(-1/2) G D_a^(-1/2), D the diagonals of the second moments
            over all tokens: a cheap stand-in for forecast_adam_ratio.
        forecast_adapter_ratio: for a matrix with a LoRA adapter, the ratio of sign(G Aᵀ) A, a first step of
            Adam from B = 0 with the trained A (G Aᵀ A where the optimizer is plain descent).
        measured_ratio: the ratio of the update at this step.
        predicted_ratio, forecast_ratio and forecast_adam_ratio have the bootstrap's standard error over
            prompts; predicted_ratio_low, ..._high and so on are the ends of the 95 % intervals.
        read_predicted_correlation, read_mean_..., read_mixture_..., read_forecast_...,
            read_forecast_adam_..., read_forecast_kronecker_..., read_forecast_adapter_..., write_...:
            Pearson's correlation with the measured ratio over layers and matrices of one role, at the
            smallest k.
    The column `treatment` of measured_ratio, and of the forecast that belongs to it, is the training's
    optimizer, and empty where that is not known; Muon has no forecast: its update of full rank has ratio
    1. The forecast of an adapter is forecast_adapter_ratio.
    """

    k: int | list[int] | None = None
    prompts: int = Field(default=2048, ge=2)  # of training examples: G has less noise the more there are
    batch_size: int = Field(default=16, ge=1)  # examples, at most: fewer where they keep more than 1 GiB
    positions: Literal["scored", "all"] = "scored"  # those whose next token the objective scores, or all
    centre: bool = False  # the moments
    unit: Literal["token", "prompt"] = "token"  # a sample: a token, or a prompt with its responses
    precision: Literal["float32", "float64"] = "float32"  # of the sums
    tokens: int = Field(default=8192, ge=2)  # of held-out text, for the inputs' subspaces
    length: int = Field(default=96, ge=2)  # tokens a sequence
    resamples: int = Field(default=40, ge=0)  # of the bootstrap over prompts; 0: no intervals
    groups: int = Field(default=16, ge=2)  # of prompts, which the bootstrap draws
    budget_gb: float | None = Field(default=None, gt=0)  # GiB for the sums; None: no limit
    objective: Objective | None = None  # whose moments, where the trajectory has no objective of its own

    @property
    def declaration(self) -> ProbeDeclaration:
        """With an `objective` also of the stages of a chain, whose own objectives are not known."""
        return ProbeDeclaration(
            headline="measured_ratio",
            section=MECHANISM,
            by_layer=False,
            divisible=True,
            compares=self.objective is not None,
            needs_objective=self.objective is None,
            whole=tuple(f"{role}_{name}_correlation" for role in ("read", "write") for name in SHOWN),
        )

    def check_examples(self, examples: Examples) -> None:
        """Refuse data without the examples that the given objective needs."""
        if self.objective is not None:
            self.objective.check(examples)

    def check(self, architecture: Architecture) -> None:
        """Refuse a k that does not fit."""
        check_dimensions(self.k, architecture.d_model, "probe.moments.k")

    def held(self, shape: Shape, objective: bool) -> float:
        """The sums over each group of prompts: of moments and, in full size, of gradients."""
        groups = self.groups if self.resamples else 1
        size = {"float32": 1, "float64": 2}[self.precision]
        in_layers = max(shape.weights - 2 * shape.logits(shape.d_model), 0.0)  # no embedding, no unembedding
        moments, gradients = 4 * shape.layers * shape.square, in_layers
        objective = objective or self.objective is not None
        sums = size * (groups * moments + (groups + 2) * gradients) if objective else 0.0
        if self.budget_gb is not None:
            sums = min(sums, max(self.budget_gb * GIB, sums / shape.layers))
        batch = prompts_at_once(shape.layers, shape.d_model, shape.longest, self.batch_size)
        return shape.weights + sums + shape.passing(2 * batch * shape.longest)

    def summary(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """Expected and measured ratio, and the correlations; the heads of columns name the optimizer."""
        there = {"predicted", "forecast", *table["quantity"].str.removesuffix("_ratio")}
        shown = by_expectation(table, [name for name in (*SHOWN, "forecast_adapter") if name in there])
        named = table[table["treatment"] != ""]
        by = dict(zip(named["quantity"], named["treatment"], strict=True))
        return shown.rename(
            columns={name: f"{name} ({by[f'{name}_ratio']})" for name in shown if f"{name}_ratio" in by}
        )

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """Expected against measured ratio."""
        from weightgeom.figures.base import expected_and_measured

        table = tables.get("training")
        if table is None or not len(own(table, "measured_ratio")):
            return {}
        return {"mechanism": expected_and_measured(table)}

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint's update since the trajectory's start."""
        objective = setting.objective or self.objective
        if objective is None or setting.from_random:
            return lambda params: []
        assert setting.training is not None
        dims = dimensions(self.k, setting.model.architecture.d_model)
        optimizer = {} if setting.objective is None else arm_columns(setting.training.optimizer)
        spaces = {frame.place: frame.space for frame in self._frames(setting, dims[-1])}
        expected = list(self._expected(setting, objective, spaces))

        def measure(params: Params) -> list[Row]:
            rows: list[Row] = []
            for matrix in setting.model.architecture.matrices:
                update = update_of(matrix, params, setting.start)
                if update.norm > 0:
                    inside = spaces[place_of(matrix)].shares(update.gram.cpu()).cumsum(0)
                    n = update.shape[0] * update.shape[1]
                    for k in dims:
                        ratio = float(inside[k - 1]) * len(update.gram) / k
                        rows.append(row("measured_ratio", ratio, n=n, **_at(matrix, k), **optimizer))
            if not rows:
                return []
            return [*expected, *rows, *_correlations([*expected, *rows], dims[0])]

        return measure

    def _frames(self, setting: Setting, k: int) -> Iterator[Frame]:
        inputs = Inputs(tokens=self.tokens, length=self.length, budget_gb=self.budget_gb)
        for frame in input_frames(setting, setting.start, k, inputs):
            yield Frame(frame.place, frame.space)  # without its moment
        yield prediction_frame(setting, setting.start, k)

    def _expected(self, setting: Setting, objective: Objective, spaces: dict) -> Iterator[Row]:
        """Rows of the ratios that the moments at the start predict, a pass at a time."""
        assert setting.training is not None
        gathering = Gathering(
            prompts=self.prompts,
            positions=self.positions,
            centre=self.centre,
            unit=self.unit,
            dtype=DTYPES[self.precision],
            groups=self.groups if self.resamples else 1,
            batch_size=prompts_at_once(
                setting.model.architecture.n_layers,
                setting.model.architecture.d_model,
                setting.training.max_length,
                self.batch_size,
            ),
            budget_gb=self.budget_gb,
        )
        passes = gradient_moments(
            *(setting.model, setting.start, objective, setting.training, setting.examples),
            *(gathering, setting.seed),
        )
        for one_pass in passes:
            for matrix in setting.model.architecture.matrices:
                if matrix.layer in one_pass.layers:
                    yield from self._of_matrix(matrix, one_pass, spaces[place_of(matrix)], setting)
            del one_pass  # before the sums of the next one are made

    def _of_matrix(
        self, matrix: ResidualMatrix, one_pass: Pass, space: Subspace, setting: Setting
    ) -> Iterator[Row]:
        """Rows of the ratios that one matrix's moments and mean gradient predict for its update."""
        assert setting.training is not None
        moment = _moment(matrix, one_pass, setting.start)
        yield from self._ratios("predicted_ratio", matrix, moment, moment.samples, space, setting)
        mean, mixture = moment.mean.cpu()[None], _mixture(matrix, moment, one_pass).cpu()
        inside = space.shares(mixture).cumsum(0)
        for k in dimensions(self.k, len(space.basis)):
            if mean.any():
                ratio = space.first(k).relative_fraction(mean)
                yield row("mean_ratio", ratio, n=moment.samples, **_at(matrix, k))
            if float(mixture.trace()) > 0:
                ratio = float(inside[k - 1]) * len(mixture) / k
                yield row("mixture_ratio", ratio, n=moment.samples, **_at(matrix, k))
        gradient = one_pass.gradients[matrix.parameter]
        forecasts = {
            "forecast_ratio": (None, self.resamples),
            "forecast_adam_ratio": (gradient.adam, self.resamples),
            "forecast_kronecker_ratio": (gradient.kronecker, 0),
        }
        own, factor = setting.training.forecast, adapter_of(matrix, setting.end, setting.start)
        if factor is not None:
            own = "forecast_adapter_ratio"
            forecasts[own] = (None, 0)
        for quantity, (divisor, resamples) in forecasts.items():
            grams = _Grams(matrix, gradient, setting.start, divisor)
            if quantity == "forecast_adapter_ratio":
                grams.adapter, grams.signs = factor, setting.training.optimizer != "sgd"
            belongs = quantity == own and setting.objective is not None
            optimizer = arm_columns(setting.training.optimizer) if belongs else {}
            rows = self._ratios(quantity, matrix, grams, one_pass.prompts, space, setting, resamples)
            yield from ({**entry, **optimizer} for entry in rows)

    def _ratios(
        self,
        quantity: str,
        matrix: ResidualMatrix,
        source: "Moment | _Grams",
        n: int,
        space: Subspace,
        setting: Setting,
        resamples: int | None = None,
    ) -> Iterator[Row]:
        resamples = self.resamples if resamples is None else resamples
        d, second = space.basis.shape[0], source.value.cpu()
        if not float(second.trace()) > 0:  # no gradient reaches the matrix: no share of it lies anywhere
            return
        inside = space.shares(second).cumsum(0)
        drawn = [
            space.shares(moment).cumsum(0)
            for moment in (moment.cpu() for moment in source.resampled(resamples, setting.seed))
            if float(moment.trace()) > 0
        ]
        for k in dimensions(self.k, d):
            scale = d / k
            value = float(inside[k - 1])
            interval = bootstrap_interval(value, [float(shares[k - 1]) for shares in drawn], len(source.sums))
            stderr = None if interval is None else interval.stderr * scale
            yield row(quantity, value * scale, n=n, stderr=stderr, **_at(matrix, k))
            if interval is not None:
                yield row(f"{quantity}_low", max(0.0, interval.low) * scale, n=n, **_at(matrix, k))
                yield row(f"{quantity}_high", min(1.0, interval.high) * scale, n=n, **_at(matrix, k))


class _Grams:
    """Gram matrices of a matrix's mean gradient on its residual side, the gain behind it folded in.

    `divisor` divides the gradient of the stored parameter, entry by entry, before the matrix is cut out.
    With the factor A of an `adapter` they are those of G Aᵀ A, or with `signs` of sign(G Aᵀ) A.
    """

    adapter: Float[Tensor, "r d_in"] | None = None
    signs: bool = False

    def __init__(
        self,
        matrix: ResidualMatrix,
        gradient: MeanGradient,
        start: Params,
        divisor: Float[Tensor, "rows columns"] | None,
    ) -> None:
        self.matrix, self.gradient, self.start, self.divisor = matrix, gradient, start, divisor
        self.sums = gradient.sums  # as many as there are groups

    @property
    def value(self) -> Float[Tensor, "d d"]:
        """The Gram matrix of the gradient of the mean loss."""
        return self._gram(self.gradient.value)

    def resampled(self, resamples: int, seed: int) -> Iterator[Float[Tensor, "d d"]]:
        """The Gram matrices of bootstrap samples of the prompts."""
        for gradient in self.gradient.resampled(resamples, seed):
            yield self._gram(gradient)

    def _gram(self, stored: Tensor) -> Float[Tensor, "d d"]:
        stored = stored if self.divisor is None else stored / self.divisor
        gradient = self.matrix.of({self.matrix.parameter: stored})
        if self.adapter is not None:
            factor = self.adapter.to(gradient)
            inner = gradient @ factor.T
            gradient = (inner.sign() if self.signs else inner) @ factor
        if (gain := self.matrix.gain(self.start)) is not None:
            gradient = gain.to(gradient)[:, None] * gradient
        x = gradient if self.matrix.role == "read" else gradient.T
        return x.T @ x


def _moment(matrix: ResidualMatrix, one_pass: Pass, start: Params) -> Moment:
    """C_a of the inputs of a matrix that reads, or C_delta of the upstream gradients of one that writes."""
    if matrix.role == "write":
        return folded(one_pass.upstream[matrix.name], matrix, start)
    (moment,) = (
        moment for site, moment in one_pass.inputs.items() if (site.name, site.layer) == place_of(matrix)
    )
    return moment


def _mixture(matrix: ResidualMatrix, moment: Moment, one_pass: Pass) -> Float[Tensor, "d d"]:
    """C + (N - 1) ρ μ μᵀ, the expected Gram matrix over N of Σ x aᵀ if x and a are independent.

    Of x, the other factor, (N - 1) ρ is estimated by ‖Σ x‖² / Σ ‖x‖² - 1, without the bias that the N terms
    x x have in ‖Σ x‖².
    """
    other = one_pass.others[matrix.name]
    firsts, squares = other.firsts, other.squares
    if matrix.role == "read":  # of the module's outputs, those of this matrix
        stored = (1, -1) if matrix.transposed else (-1, 1)
        firsts, squares = (
            matrix.of({matrix.parameter: sums.reshape(stored)}).squeeze(1) for sums in (firsts, squares)
        )
    total = float(squares.sum())
    repeats = float(firsts.square().sum()) / total - 1 if total else 0.0
    mean = moment.mean
    return moment.value + (repeats + moment.centred) * torch.outer(mean, mean)


def _at(matrix: ResidualMatrix, k: int) -> dict:
    return {**matrix.table_columns, "subspace": place_of(matrix)[0], "k": k}


def _correlations(rows: list[Row], k: int) -> Iterator[Row]:
    """Pearson's correlations of expected with measured ratios, where they are defined."""
    for role in ("read", "write"):
        by_quantity: dict[str, dict[tuple, float]] = {}
        for entry in rows:
            if entry["role"] == role and entry["k"] == k:
                place = entry["layer"], entry["matrix"], entry["expert"]
                by_quantity.setdefault(entry["quantity"], {})[place] = entry["value"]
        measured = by_quantity.get("measured_ratio", {})
        for name in EXPECTED:
            expected = by_quantity.get(f"{name}_ratio", {})
            pairs = torch.tensor(
                [[expected[place], measured[place]] for place in measured if place in expected],
                dtype=torch.float64,
            )
            if len(pairs) > 2 and bool((pairs.std(0) > 0).all()):
                correlation = float(torch.corrcoef(pairs.T)[0, 1])
                yield row(f"{role}_{name}_correlation", correlation, n=len(pairs), role=role, k=k)
