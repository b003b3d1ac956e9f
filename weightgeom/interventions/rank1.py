"""Closed-form rank-1 edits along a named direction, against directions that differ in nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.causal.directions import Control, Directions, check_direction, haar, signed, unit
from weightgeom.causal.edits import RankOne, change_norm
from weightgeom.causal.effects import Effects, Evaluation
from weightgeom.causal.trials import Arm, Trial, check_controls, measured, with_q_values
from weightgeom.declarations import EDITS, InterventionDeclaration
from weightgeom.estimators.moments import Moment, activation_moments
from weightgeom.estimators.reference_subspaces import Place, check_dimensions, dimensions, place_of
from weightgeom.geometry.subspace import Subspace, prediction_moment
from weightgeom.interfaces import Log, Setting
from weightgeom.models.residual import INPUTS, Architecture, Kind, ResidualMatrix, Site, chosen
from weightgeom.models.weights import difference
from weightgeom.params import Params
from weightgeom.table import Row
from weightgeom.text.tokens import packed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MARGIN = "preference_margin_change"


@dataclass(frozen=True)
class Rank1:
    """W' = W + α u vᵀ: one side along a direction of the residual stream, the other shared by all arms.

    The residual side is v for a matrix that reads and u for one that writes. The other side is, by `shared`,
    Haar-random or the partner of the direction in the top singular pair of G or of the update; for a matrix
    that writes, `input` is the top direction of its own input. `auto` is random for reads, input for writes.
    A direction that is one side of a singular pair brings its other side with it. `match` is the size that a
    control shares with the treatment: `frobenius` ‖dW‖_F, and so α; `output` E‖dW a‖² = α² vᵀ C v on held-out
    text. Where a norm follows the matrix, the direction is that of the edit at the stream.

    Quantities: those of `weightgeom.causal.trials.measured`. Source: arXiv:2605.16600; the choice of the
    shared side, of the controls and of their numbers is ours.
    """

    matrices: list[Kind] = Field(default_factory=lambda: ["k", "o"], min_length=1)
    layers: list[int] | None = None
    at: Literal["auto", "start", "end"] = "auto"
    direction: str = "auto"
    shared: Literal["auto", "random", "input", "gradient", "delta"] = "auto"
    behaviour: Literal["heldout_ce", "preference_margin"] = "heldout_ce"
    strengths: list[float] = Field(default_factory=lambda: [0.03, 0.1, 0.3], min_length=1)
    relative: bool = True
    match: Literal["frobenius", "output"] = "frobenius"
    controls: dict[Control, int] = Field(
        default_factory=lambda: {"random": 39, "bottom": 1, "orthogonal": 9, "within": 9, "layer": 1}
    )
    level: float = Field(default=0.05, gt=0, lt=1)
    k: int | None = None
    tokens: int = Field(default=8192, ge=2)
    length: int = Field(default=96, ge=2)
    effects: Effects = Field(default_factory=Effects)

    def __post_init__(self) -> None:
        """Refuse strengths and numbers that mean nothing."""
        if bad := [strength for strength in self.strengths if not (strength > 0 and strength < float("inf"))]:
            raise ValueError(f"strengths must be positive and finite, got {bad[0]}")
        if negative := [control for control in self.controls.items() if control[1] < 0]:
            raise ValueError("controls.{} must be 0 or more, got {}".format(*negative[0]))

    @property
    def declaration(self) -> InterventionDeclaration:
        """KL from the unedited model, against the kinds of control that are asked for."""
        return InterventionDeclaration(("kl_from_unedited",), tuple(self.controls), EDITS)

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """Effects by layer, and by strength."""
        from weightgeom.figures.causal import dose_response, treatment_by_layer

        table = tables["training"]
        drawn = {
            "rank1_by_layer": treatment_by_layer(table),
            "rank1_dose_response": dose_response(table),
        }
        if MARGIN in set(table["quantity"]):
            drawn["rank1_dose_response_margin"] = dose_response(table, MARGIN)
        return drawn

    def check(self, architecture: Architecture) -> None:
        """Refuse layers and matrices that the model does not have, and too few controls for `level`."""
        check_controls(self.controls.get("random", 0), self.level)
        self._check_pairs(self.effects.pairs, "raise intervention.rank1.effects.pairs")
        check_dimensions(self.k, architecture.d_model, "intervention.rank1.k")
        for matrix in chosen(architecture, self.matrices, self.layers):
            name = self._direction(matrix)
            check_direction(name, matrix, architecture.d_model)
            if self.shared == "input" and matrix.role == "read":
                raise ValueError(
                    f"shared=input is the input's side, which is the varied side of {matrix.name}"
                )
        for kind in self.matrices:
            others = sum(matrix.kind == kind for matrix in architecture.matrices) - 1
            if self.controls.get("layer", 0) > others:
                raise ValueError(
                    f"controls.layer is {self.controls['layer']}, and there are {others} other layers with a"
                    f" matrix {kind}"
                )
        if self.controls.get("bottom", 0) > architecture.d_model:
            raise ValueError(f"controls.bottom is at most {architecture.d_model}, the width of the stream")
        k = dimensions(self.k, architecture.d_model)[0]
        if k == architecture.d_model and self.controls.get("orthogonal"):
            raise ValueError(f"nothing is orthogonal to a subspace of k={k}, the whole stream: lower k")
        if self.match == "output" and self.tokens < architecture.d_model:
            raise ValueError(
                f"match=output needs the inputs' covariance, which is singular on {self.tokens} tokens for a"
                f" stream {architecture.d_model} wide: raise intervention.rank1.tokens"
            )

    def arms(self, architecture: Architecture) -> int:
        """Treatments and controls, over matrices and strengths."""
        each = [
            1 + sum(self.controls.values()) - (0 if self._varies(matrix) else self.controls.get("layer", 0))
            for matrix in chosen(architecture, self.matrices, self.layers)
        ]
        return len(self.strengths) * sum(each)

    def rows(self, setting: Setting, log: Log) -> list[Row]:
        """The effects of every arm on the model `at` the start or the end of the trajectory."""
        pairs = len(setting.examples.heldout_pairs)
        self._check_pairs(pairs, "take another behaviour, as the data hold none")
        at_end = self.at == "end" or (self.at == "auto" and setting.from_random)
        evaluation = Evaluation(
            setting.model, setting.end if at_end else setting.start, setting.examples, self.effects
        )
        trials = list(self.trials(setting, evaluation))  # all, so that none is refused behind others' arms
        rows = list(measured(trials, evaluation, setting.seed, log, keep=setting.keep))
        return [{"step": setting.last if at_end else 0, **entry} for entry in with_q_values(rows)]

    def trials(self, setting: Setting, evaluation: Evaluation) -> Iterator[Trial]:
        """Every matrix and strength, with the treatment and all of its controls; layer by layer."""
        architecture = setting.model.architecture
        matrices = chosen(architecture, self.matrices, self.layers)
        others = chosen(architecture, self.matrices, None) if self.controls.get("layer") else matrices
        gradients = evaluation.gradients({matrix.parameter for matrix in others})
        k = dimensions(self.k, architecture.d_model)[0]
        moments = self._moments(setting, evaluation.params, matrices)
        axes: dict[Place, Subspace] = {
            (site.name, site.layer): _axes(moment.value)
            for site, moment in moments.items()
            if site.name in INPUTS.values()
        }
        gain = architecture.final_norm.gain(evaluation.params)
        axes["prediction", None] = _axes(prediction_moment(architecture.unembedding(evaluation.params), gain))
        directions = Directions(axes, k, setting.seed)
        inputs = {(site.name, site.layer): moment.value.double().cpu() for site, moment in moments.items()}
        sides = _Sides(self, setting, evaluation.params, gradients, directions, inputs)
        for matrix in matrices:
            for strength in self.strengths:
                yield sides.trial(matrix, strength)

    def _check_pairs(self, pairs: int, advice: str) -> None:
        if "gradient" in (self.direction, self.shared) and self.behaviour != "heldout_ce" and not pairs:
            raise ValueError(f"the gradient of {self.behaviour} needs pairs: {advice}")

    def _direction(self, matrix: ResidualMatrix) -> str:
        if self.direction != "auto":
            return self.direction
        return "activation" if matrix.role == "read" else "prediction"

    def _varies(self, matrix: ResidualMatrix) -> bool:
        """Whether the direction is another one in every layer."""
        return self._direction(matrix) in ("activation", "gradient", "delta")

    def _moments(
        self, setting: Setting, params: Params, matrices: list[ResidualMatrix]
    ) -> dict[Site, Moment]:
        """Second moments of every block's input, and of the own inputs of the matrices that write."""
        model = setting.model
        own = [
            Site(matrix.layer, matrix.site, matrix.module) for matrix in matrices if matrix.role == "write"
        ]
        batches = packed(setting.examples.heldout, model.tokenizer, self.length, self.tokens)
        sites = (*model.architecture.sites, *own)
        return dict(activation_moments(model, params, batches, sites, dtype=torch.float64))


@plain_dataclass(frozen=True, eq=False)
class _Sides:
    """The directions of an edit's two sides."""

    asked: Rank1
    setting: Setting
    params: Params
    gradients: Mapping[str, Params]
    directions: Directions
    inputs: Mapping[tuple[str, int], Float[Tensor, "d_in d_in"]]

    def trial(self, matrix: ResidualMatrix, strength: float) -> Trial:
        """The treatment at one strength and all its controls."""
        name = self.asked._direction(matrix)
        residual, partner = self._named(name, matrix)
        other = self._shared(matrix) if partner is None else partner
        alpha = strength * (float(matrix.of(self.params).double().norm()) if self.asked.relative else 1.0)
        treatment = self._arm(name if name in _KINDS else "file", matrix, residual, other, alpha)
        controls = [
            self._arm(kind, matrix, vector, other, alpha, draw, treatment)
            for kind, number in self.asked.controls.items()
            for draw, vector in enumerate(self._controls(kind, number, matrix, name))
        ]
        subspace = place_of(matrix)[0]
        place = {**matrix.table_columns, "subspace": subspace, "k": self.directions.k}
        return Trial(place, f"{strength:g}", treatment, controls)

    def _controls(
        self, kind: Control, number: int, matrix: ResidualMatrix, name: str
    ) -> Iterator[Float[Tensor, " d_model"]]:
        if kind != "layer":
            yield from (self.directions.control(kind, matrix, draw) for draw in range(number))
        elif self.asked._varies(matrix):
            others = [
                other
                for other in self.setting.model.architecture.matrices
                if other.kind == matrix.kind and other.layer != matrix.layer
            ]
            nearest = sorted(others, key=lambda other: abs(other.layer - matrix.layer))[:number]
            yield from (self._named(name, other)[0] for other in nearest)

    def _named(self, name: str, matrix: ResidualMatrix) -> tuple[Float[Tensor, " d_model"], Tensor | None]:
        """A direction of the stream; where a norm lies between, the side of W that reaches it."""
        gradients = self.gradients.get(self.asked.behaviour, {})
        update = difference(self.setting.end, self.setting.start, self.setting.model.architecture)
        vector, partner = self.directions.named(name, matrix, gradients, update)
        if partner is not None and matrix.role == "write" and matrix.norm is not None:
            vector = vector * matrix.norm.gain(self.params).double().cpu()
            return unit(vector, f"the {name} of {matrix.name} behind its norm"), partner
        return vector, partner

    def _shared(self, matrix: ResidualMatrix) -> Tensor:
        """The side that is not the residual stream: the output of a read, or the input of a write."""
        wanted = self.asked.shared
        if wanted == "auto":
            wanted = "random" if matrix.role == "read" else "input"
        if wanted == "input":
            return _axes(self.inputs[matrix.site, matrix.layer], 1).basis[:, 0]
        if wanted == "random":
            shape = matrix.of(self.params).shape
            return haar(shape[0 if matrix.role == "read" else 1], f"{self.setting.seed} {matrix.name} shared")
        partner = self._named(wanted, matrix)[1]
        assert partner is not None
        return partner

    def _arm(
        self,
        kind: str,
        matrix: ResidualMatrix,
        residual: Float[Tensor, " d_model"],
        other: Tensor,
        alpha: float,
        draw: int = 0,
        treatment: Arm | None = None,
    ) -> Arm:
        if matrix.role == "read":
            u, v = other, residual
        else:
            gain = 1.0 if matrix.norm is None else matrix.norm.gain(self.params).double().cpu()
            u, v = unit(residual / gain, f"the direction {kind} before the norm behind {matrix.name}"), other
        energy = self._energy(matrix, v)
        if treatment is not None and self.asked.match == "output":
            alpha = sqrt(treatment.sizes["output energy"] / energy)
        edit = RankOne(matrix, alpha, u, v)
        exact = {matrix.parameter: self.params[matrix.parameter].double()}  # fp32 would round a weak edit
        return Arm(
            kind,
            edit,
            {
                "frobenius norm": change_norm(edit, exact, [matrix]),
                "output energy": alpha**2 * energy,
            },
            "frobenius norm" if self.asked.match == "frobenius" else "output energy",
            draw,
            {effect: edit.first_order(gradient) for effect, gradient in self.gradients.items()},
        )

    def _energy(self, matrix: ResidualMatrix, v: Float[Tensor, " d_in"]) -> float:
        """vᵀ C v: the output energy of an edit of α = 1 on held-out text."""
        moment = self.inputs[matrix.site, matrix.layer]
        energy = float(v @ moment @ v)
        if self.asked.match == "output" and not energy > 1e-6 * float(moment.diagonal().max()):
            raise ValueError(
                f"match=output: the covariance of the inputs of {matrix.name} is singular along a direction"
                f" of the trial (energy {energy:.3g}), which no strength makes up for: leave that control"
                " out, raise intervention.rank1.tokens, or take match=frobenius"
            )
        return energy


_KINDS = ("activation", "prediction", "gradient", "delta", "random")


def _axes(moment: Float[Tensor, "d d"], k: int | None = None) -> Subspace:
    """The principal directions of a second moment, the first `k` or all, with their signs made definite."""
    return Subspace(signed(Subspace.top(moment.cpu(), len(moment) if k is None else k).basis))
