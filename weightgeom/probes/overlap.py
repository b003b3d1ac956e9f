"""Principal angles between subspaces of the residual stream, of updates, inputs and gradients."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.bases.hub import fetch
from weightgeom.bases.remote import is_remote
from weightgeom.declarations import ProbeDeclaration
from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.estimators.moments import Moment
from weightgeom.estimators.pairs import MatrixPair, Visit, alone
from weightgeom.estimators.reference_subspaces import (
    Inputs,
    check_dimensions,
    dimensions,
    input_moments,
    prediction_frame,
    top_directions,
)
from weightgeom.estimators.updates import update_of, zeros
from weightgeom.geometry.nulls import null_ratio_sd
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.residual import INPUTS, Architecture, ResidualMatrix, Site, first_readers
from weightgeom.params import Params
from weightgeom.table import Row, row

OF_INPUTS = tuple(INPUTS.values())
THINGS = (*OF_INPUTS, "prediction", "upstream", "gradient", "delta", "weight")
SUFFIXES = ("before", "end", "other", "next_layer")
ROTATION = "weight:weight_before"
ROUNDING = 10  # times the precision and the largest eigenvalue: smaller eigenvalues of a Gram are rounding


@dataclass(frozen=True)
class Checkpoints:
    """The directories or URLs of two checkpoints of one architecture, before and after another training."""

    before: str
    after: str


@plain_dataclass(frozen=True)
class Side:
    """One side of a pair: which subspace, and of which model or layer (`here` without a suffix)."""

    thing: str
    at: str

    @classmethod
    def parsed(cls, name: str) -> "Side":
        """The side that a name such as `delta_end` stands for.

        Raises:
            ValueError: if it stands for none.
        """
        for at in SUFFIXES:
            if name.removesuffix(f"_{at}") in THINGS and name not in THINGS:
                side = cls(name.removesuffix(f"_{at}"), at)
                if side in (cls("delta", "before"), cls("prediction", "next_layer")):
                    raise ValueError(f"there is no {name}: the start has no update, and no layer predicts")
                return side
        if name not in THINGS:
            raise ValueError(
                f"unknown subspace {name!r}; there are {', '.join(THINGS)},"
                f" each alone or followed by _{', _'.join(SUFFIXES)}"
            )
        return cls(name, "here")


@dataclass(frozen=True)
class Overlap:
    """The overlap of any two k-dimensional subspaces U and V of the residual stream, at every checkpoint.

    A pair is `one:other`, in the column `subspace`. The subspaces: `delta`, `weight` and `gradient` are
    the top singular directions, on the residual stream's side, of the update since the start, of the
    matrix, and of the mean gradient G; `upstream` those of E[δ δᵀ] at the output of o and down;
    `attention_input`, `mixer_input` and `mlp_input` those of the layer's inputs on held-out text;
    `prediction` that of the unembedding. They are those of the checkpoint, but with a suffix those of the
    trajectory's start (`_before`), of its end (`_end`), of the checkpoints in `other` (`_other`), or of
    the next layer's matrix of the same kind (`_next_layer`). Gradients are taken on training examples,
    and only where the objective is known, as if it began at that model: a reference policy is the model
    itself. A subspace with fewer than k directions above rounding counts with those that it has, and one
    with none has no rows.

    Quantities:
        overlap: ‖Uᵀ V‖²_F / k = mean cos² of the principal angles, in [0, 1]; 1 is the same subspace.
        overlap_ratio: overlap over k/d, its expectation where either subspace is Haar-uniform; 1 is chance.
        null_ratio_mean, null_ratio_sd: mean (1) and standard deviation of overlap_ratio there, exact.
        mean_angle, largest_angle: of the principal angles, degrees, in [0, 90].
        rotation: mean_angle of `weight:weight_before`: how far training turned the matrix's own principal
            subspace. Source: the rotation of arXiv:2511.08567, for one side and by the mean angle (ours).

    The column `k` is the k asked for, and n the number of principal angles, the smaller dimension of the
    two. Pairs of two inputs are filed under q or up
    (the router of experts, the first matrix of a mixer), that of two predictions under unembed. One basis for
    every matrix and fixed side (`_before`, `_end`, `_other`) is held in memory.
    """

    k: int | None = None  # null: d/8
    pairs: list[str] = Field(
        default=[
            "weight:weight_before",
            "delta:attention_input",
            "delta:mixer_input",
            "delta:mlp_input",
            "delta:prediction",
            "delta:gradient_before",
            "delta:upstream_before",
            "gradient_before:prediction",
            "upstream_before:prediction",
            "delta:delta_end",
            "delta:delta_next_layer",
        ],
        min_length=1,
    )
    other: Checkpoints | None = None
    tokens: int = Field(default=8192, ge=2)  # of held-out text, for the inputs
    length: int = Field(default=96, ge=2)  # tokens a sequence
    prompts: int = Field(default=256, ge=1)  # of the training examples, for gradients
    budget_gb: float | None = Field(default=None, gt=0)  # GiB for weights and sums; null: no limit

    def __post_init__(self) -> None:
        """Refuse pairs that there are not."""
        for pair, sides in self._sides.items():
            if self.other is None and any(side.at == "other" for side in sides):
                raise ValueError(f"the pair {pair} needs probe.overlap.other={{before: DIR, after: DIR}}")

    @property
    def declaration(self) -> ProbeDeclaration:
        """The rotation of every matrix, where it is measured."""
        return ProbeDeclaration(
            "rotation" if ROTATION in self.pairs else "", by_layer=False, generic=False, divisible=True
        )

    @property
    def inputs(self) -> Inputs:
        """The text that the moments of inputs are taken on."""
        return Inputs(self.tokens, self.length, budget_gb=self.budget_gb)

    @property
    def _sides(self) -> dict[str, tuple[Side, Side]]:
        declared = {}
        for pair in self.pairs:
            names = pair.split(":")
            if len(names) != 2:
                raise ValueError(f"a pair is one:other, such as delta:prediction, got {pair!r}")
            declared[pair] = (Side.parsed(names[0]), Side.parsed(names[1]))
        return declared

    def check(self, architecture: Architecture) -> None:
        """Raise ValueError if k exceeds the width of the stream, or a checkpoint of `other` is not there."""
        check_dimensions(self.k, architecture.d_model, "probe.overlap.k")
        for key in ("before", "after") if self.other else ():
            directory = getattr(self.other, key)
            if not is_remote(directory) and not Path(directory).is_dir():
                raise ValueError(f"probe.overlap.other.{key} is no directory: {directory}")
            fetch(directory)  # of a URL the config and the header, which tell now whether it can be read

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint; subspaces of other models are found once."""
        return alone(self, setting)

    def visits(self, setting: Setting) -> Callable[[Params], Visit]:
        """The same, for a walk with others."""
        architecture = setting.model.architecture
        (k,) = dimensions(self.k, architecture.d_model)
        fixed = {
            "before": Spaces(self, setting, k, setting.start, setting.start),
            "end": Spaces(self, setting, k, setting.end, setting.start),
        }
        if self.other is not None:
            after, before = (
                setting.model.params(fetch(directory)) for directory in (self.other.after, self.other.before)
            )
            fixed["other"] = Spaces(self, setting, k, after, before)

        wanted = {side for sides in self._sides.values() for side in sides}

        def visit(params: Params) -> Visit:
            here = Spaces(self, setting, k, params, setting.start)
            models = {**fixed, "here": here, "next_layer": here}
            if params is setting.end:
                models["end"] = here
            of_inputs = any(models[side.at] is here and side.thing in OF_INPUTS for side in wanted)

            def see(pair: MatrixPair) -> None:
                for side in wanted:
                    models[side.at].see(side.thing, pair)

            def rows() -> list[Row]:
                return [
                    {**entry, "subspace": pair, "k": k}
                    for pair, sides in self._sides.items()
                    for matrix in _matrices(architecture, sides)
                    for entry in _compared(pair, matrix, [models[side.at].of(side, matrix) for side in sides])
                ]

            return Visit(see, rows, self.inputs if of_inputs else None, here.see_input)

        return visit


@plain_dataclass(frozen=True, eq=False)
class Spaces:
    """Orthonormal bases of one model's subspaces, each found when it is first asked for and then kept."""

    probe: Overlap
    setting: Setting
    k: int
    params: Params
    start: Params

    def of(self, side: Side, matrix: ResidualMatrix | None) -> Float[Tensor, "d k"] | None:
        """The basis for one matrix, or None where there is none."""
        if side.thing == "prediction":
            return self._prediction
        assert matrix is not None
        layer = matrix.layer + (side.at == "next_layer")
        place = (side.thing, f"L{layer}" if side.thing in OF_INPUTS else f"L{layer}.{matrix.label}")
        if side.thing in OF_INPUTS:
            if not self._inputs:
                for site, moment in input_moments(self.setting, self.params, self.probe.inputs):
                    self.see_input(site, moment)
            return self._inputs.get(place)
        if side.thing in ("upstream", "gradient"):
            return self._gradients.get(place)
        if place not in self._matrices:
            self._matrices[place] = self._of_matrix(*place)
        return self._matrices[place]

    def see(self, thing: str, pair: MatrixPair) -> None:
        """Find the basis of an update or a matrix that is one of the pair's, from its decompositions."""
        place = (thing, pair.matrix.name)
        if thing not in ("delta", "weight") or place in self._matrices:
            return
        if thing == "delta" and self.params is pair.params and self.start is pair.start:
            self._matrices[place] = _top(pair.update.gram.cpu(), self.k)
        elif thing == "weight" and (self.params is pair.start or self.params is pair.params):
            parts = pair.parts_before if self.params is pair.start else pair.parts_after
            most = _rank(parts.values.square(), pair.after.dtype)
            self._matrices[place] = parts.top(pair.matrix, min(self.k, most)) if most else None

    def see_input(self, site: Site, moment: Moment) -> None:
        """Find the basis of an input."""
        space, _ = top_directions(site, moment, self.k)
        self._inputs[site.name, f"L{site.layer}"] = _above_rounding(space.basis, moment.value.cpu())

    @cached_property
    def _inputs(self) -> dict[tuple[str, str], Tensor]:
        return {}

    @cached_property
    def _matrices(self) -> dict[tuple[str, str], Tensor | None]:
        return {}

    def _of_matrix(self, thing: str, name: str) -> Float[Tensor, "d k"] | None:
        matrix = self._by_name.get(name)
        if matrix is None:
            return None
        before = self.start if thing == "delta" else zeros(matrix, self.params)
        return _top(update_of(matrix, self.params, before).gram, self.k)

    @cached_property
    def _by_name(self) -> Mapping[str, ResidualMatrix]:
        return {matrix.name: matrix for matrix in self.setting.model.architecture.matrices}

    @cached_property
    def _prediction(self) -> Float[Tensor, "d k"]:
        return prediction_frame(self.setting, self.params, self.k).space.basis

    @cached_property
    def _gradients(self) -> dict[tuple[str, str], Tensor | None]:
        setting, probe = self.setting, self.probe
        if setting.objective is None or setting.training is None:
            return {}
        wanted = {side.thing for sides in probe._sides.values() for side in sides}
        gathering = Gathering(
            probe.prompts,
            inputs=False,
            upstream="upstream" in wanted,
            gradients="gradient" in wanted,
            budget_gb=probe.budget_gb,
        )
        bases: dict[tuple[str, str], Tensor | None] = {}
        for one_pass in gradient_moments(
            setting.model,
            self.params,
            setting.objective,
            setting.training,
            setting.examples,
            gathering,
            setting.seed,
        ):
            for name, moment in one_pass.upstream.items():
                bases["upstream", name] = _top(moment.value.cpu(), self.k)
            means = {name: mean.value.cpu() for name, mean in one_pass.gradients.items()}
            for name, matrix in self._by_name.items():
                if matrix.parameter in means:
                    gram = update_of(matrix, means, zeros(matrix, means), written=False).gram
                    bases["gradient", name] = _top(gram, self.k)
        return bases


def _matrices(architecture: Architecture, sides: tuple[Side, Side]) -> Iterator[ResidualMatrix | None]:
    """The matrices that a pair has rows for; None for one that belongs to no layer."""
    things = [side.thing for side in sides if side.thing != "prediction"]
    if not things:
        yield None
    elif all(thing in OF_INPUTS for thing in things):
        yield from (reader for reader in first_readers(architecture.matrices) if reader.site == things[0])
    else:
        yield from architecture.matrices


def _compared(
    pair: str, matrix: ResidualMatrix | None, bases: list[Float[Tensor, "d _"] | None]
) -> Iterator[Row]:
    from scipy.linalg import subspace_angles

    first, second = bases
    if first is None or second is None:
        return
    d, n = len(first), min(first.shape[1], second.shape[1])
    angles = torch.from_numpy(subspace_angles(first.numpy(), second.numpy())).rad2deg()
    energy = (first.T @ second).square().sum().item()
    place: dict[str, Any] = {"matrix": "unembed", "role": "read"} if matrix is None else matrix.table_columns
    values = {
        "overlap": (min(1.0, energy / n), "1"),
        "overlap_ratio": (energy * d / (first.shape[1] * second.shape[1]), "1"),
        "null_ratio_mean": (1.0, "1"),
        "null_ratio_sd": (null_ratio_sd(d, first.shape[1], second.shape[1]), "1"),
        "mean_angle": (angles.mean().item(), "degree"),
        "largest_angle": (angles.max().item(), "degree"),
    }
    if pair == ROTATION:
        values["rotation"] = values["mean_angle"]
    for quantity, (value, unit) in values.items():
        yield row(quantity, value, n=n, unit=unit, **place)


def _top(gram: Float[Tensor, "d d"], k: int) -> Float[Tensor, "d _"] | None:
    """Top eigenvectors of a Gram matrix or second moment, k of them or as many as it has."""
    if not bool(gram.any()):
        return None
    return _above_rounding(Subspace.top(gram, k).basis, gram)


def _above_rounding(basis: Float[Tensor, "d k"], gram: Float[Tensor, "d d"]) -> Float[Tensor, "d _"]:
    """The leading eigenvectors, without those that only rounding adds to a matrix of lower rank."""
    return basis[:, : _rank((basis * (gram.double() @ basis)).sum(0), gram.dtype)]


def _rank(values: Float[Tensor, " k"], dtype: torch.dtype) -> int:
    """How many of descending eigenvalues are more than rounding; 0 where all are zero."""
    return int((values > ROUNDING * torch.finfo(dtype).eps * values[0]).sum())
