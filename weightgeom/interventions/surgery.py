"""Surgery on an update: its part inside a subspace is removed, kept or scaled; groups are transplanted."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import lru_cache, partial
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.causal.edits import Space, Surgery, Transplant, TransplantRest, change_norm, residual_side
from weightgeom.causal.effects import UNITS, Effects, Evaluation, Samples
from weightgeom.causal.matrix_groups import Group, group_of, grouped, kinds_of, moved, reads_and_writes
from weightgeom.causal.trials import Arm, Trial, check_controls, measured, named, with_q_values
from weightgeom.declarations import SURGERY, InterventionDeclaration
from weightgeom.estimators.given_subspaces import (
    Frames,
    GivenSubspace,
    check_frame_prompts,
    check_frames,
    frame_dimensions,
    given_subspaces,
)
from weightgeom.estimators.reference_subspaces import (
    Inputs,
    check_dimensions,
    dimensions,
    input_frames,
    place_of,
    prediction_frame,
)
from weightgeom.interfaces import Log, Setting
from weightgeom.models.residual import Architecture, Kind, ResidualMatrix
from weightgeom.params import Params
from weightgeom.table import Row, arm_columns, by_given_subspace, row
from weightgeom.text.examples import Examples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MARGIN = "preference_margin_change"
REST = "rest"  # the parameters in no matrix of the residual stream
SIGNS = {("weights", "", ""): 1, ("delta", "", "read"): -1, ("delta", "", "write"): -1, (REST, REST, ""): -1}
"""The sign of each part, by its edit, `matrix` and `role`, in the remainder: whole effect less parts."""
Operation = Literal["remove", "keep", "scale"]
Control = Literal["random_k", "random_energy", "rotated"]
RANDOM: tuple[Control, ...] = ("random_k", "random_energy")


@dataclass(frozen=True)
class DeltaSurgery:
    """Takes an update apart, along a subspace and by matrices: which part carries the behaviour?

    `top@<operation>` edits the trajectory's end. With P the projector on the top k directions of what a
    matrix reads, or of the unembedding if it writes, the part inside, dW P or P dW, is removed, kept as
    the only one, or scaled by `factor`. A part that carries the behaviour changes much when it is removed,
    and little where it alone is kept: that is what the p-values of `keep` test. Two controls, drawn once
    for all matrices that share a subspace: `random_k`, a Haar-random subspace of equal k, and
    `random_energy`, as many Haar-random directions as hold the same energy ‖dW P‖²_F, matrix by matrix,
    the last of them scaled. `remove` takes that energy away and `keep` keeps it; where a norm follows the
    matrix, it is that of the part that reaches the stream.

    `delta@transplant` edits the trajectory's start: W + dW for some matrices. With those that write it is
    base reads and aligned writes, with those that read the reverse. `weights@replace`, every parameter,
    is the whole effect, which the others are shares of. The control `rotated` has the same dW, its residual
    stream's side turned by a Haar-random orthogonal matrix, one for each subspace above.

    With `frames`, further subspaces by name (`weightgeom.estimators.given_subspaces`), the part of the update
    inside each is edited likewise, against the same controls; its name is in the column `subspace`. A
    contrast with fewer than k directions is taken with those it has, and a file with all of its own.

    With `transplants` and `layers` left out, `rest@replace` gives the start all parameters of the end that
    are in no matrix of the stream: embeddings, unembedding, norms, biases. Its rotated dW is turned along the
    last axis, that of a vector to a random direction. The whole effect is then the sum of four: of the reads,
    of the writes, of the rest, and of their interaction, which is the remainder.

    Quantities: those of `weightgeom.causal.trials.measured`, and `<effect>_interaction` of `weights@replace`,
    in the effect's unit. The column `matrix` is empty for all matrices of a role, `q+k` for two kinds, and
    `rest`. Source: ours, on the subspaces of arXiv:2605.16600.
    """

    groups: list[list[Kind]] | None = None
    layers: list[int] | None = None
    operations: list[Operation] = Field(default_factory=lambda: ["remove", "keep"])
    factor: float | None = None
    k: int | list[int] | None = None
    frames: Frames | None = None
    transplants: list[list[Kind]] | None = None
    controls: dict[Control, int] = Field(
        default_factory=lambda: {"random_k": 19, "random_energy": 19, "rotated": 19}
    )
    level: float = Field(default=0.05, gt=0, lt=1)
    tokens: int = Field(default=8192, ge=2)
    length: int = Field(default=96, ge=2)
    effects: Effects = Field(default_factory=Effects)

    def __post_init__(self) -> None:
        """Refuse settings that ask for nothing or contradict each other."""
        if not self.operations:
            raise ValueError("operations is empty: name remove, keep or scale, or give groups=[] for none")
        if "scale" in self.operations and self.factor is None:
            raise ValueError("the operation scale needs a factor for the part inside: give factor")
        if self.factor is not None and (not isfinite(self.factor) or self.factor == 1):
            raise ValueError(f"factor must be finite, and not the 1 that changes nothing, got {self.factor}")
        if negative := [(kind, number) for kind, number in self.controls.items() if number < 0]:
            raise ValueError(f"controls.{negative[0][0]} must be 0 or more, got {negative[0][1]}")
        if self.groups == [] and self.transplants == []:
            raise ValueError("groups and transplants are both empty: nothing is left to do")

    @property
    def declaration(self) -> InterventionDeclaration:
        """The preference margin, or the KL of data without pairs, against the controls that are asked for."""
        kinds = tuple(kind for kind in (*RANDOM, "rotated") if self.controls.get(kind))
        return InterventionDeclaration((MARGIN, "kl_from_unedited"), kinds, SURGERY, needs_update=True)

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """The margin by dimension that is taken out or kept, and by the part that is transplanted."""
        from weightgeom.figures.causal import surgery_curve, transplants

        table = tables["training"]
        if MARGIN not in set(table["quantity"]):
            return {}
        parts = by_given_subspace(table)
        drawn = {f"surgery_{name}".strip("_"): surgery_curve(rows) for name, rows in parts.items()}
        if "transplant" in set(table["dose"]):
            drawn["transplants"] = transplants(table)
        return drawn

    def check(self, architecture: Architecture) -> None:
        """Refuse layers and matrices that the model does not have, and too few controls for `level`."""
        check_dimensions(self.k, architecture.d_model, "intervention.surgery.k")
        check_frames(self.frames, architecture, "intervention.surgery.frames")
        groups = self._groups(architecture)
        if mixed := [group.place["matrix"] or "of all" for group in groups if not group.place["role"]]:
            raise ValueError(
                f"the group {mixed[0]} reads and writes, in different subspaces: split it in two"
            )
        if groups:
            numbers = [self.controls.get(kind, 0) for kind in RANDOM]
            for number in [count for count in numbers if count] or [0]:
                check_controls(number, self.level)
        if self._transplants(architecture):
            check_controls(self.controls.get("rotated", 0), self.level)

    def check_examples(self, examples: Examples) -> None:
        """Refuse groups of prompts that are missing or too small."""
        check_frame_prompts(self.frames, examples, "intervention.surgery.frames")

    def arms(self, architecture: Architecture) -> int:
        """Treatments and controls of all surgeries, and of all transplants and that of all weights."""
        transplants = len(self._transplants(architecture))
        trials = transplants + 1 + self._whole if transplants else 0
        return self._surgeries(architecture) + trials * (1 + self.controls.get("rotated", 0))

    def rows(self, setting: Setting, log: Log) -> list[Row]:
        """The effects of every surgery on the trajectory's end, and of every transplant on its start.

        Raises:
            ValueError: if no matrix moved from the one to the other.
        """
        architecture, model = setting.model.architecture, setting.model
        groups, transplants = moved(setting, self._groups(architecture), self._transplants(architecture))
        rows: list[Row] = []
        if groups:
            evaluation = Evaluation(model, setting.end, setting.examples, self.effects)
            trials = self.surgeries(setting, evaluation, groups)
            rows += measured(trials, evaluation, setting.seed, log, keep=setting.keep)
            del evaluation, trials  # their weights and logits would be held together with the next one's
        if transplants:
            evaluation = Evaluation(model, setting.start, setting.examples, self.effects)
            trials = list(self.transplanted(setting, evaluation, transplants))
            done = self._surgeries(architecture)
            rows += measured(trials, evaluation, setting.seed, log, done, setting.keep)
            rows += interaction(trials, evaluation) if self._whole else []
        return [{"step": setting.last, **entry} for entry in with_q_values(rows)]

    def surgeries(self, setting: Setting, evaluation: Evaluation, groups: Sequence[Group]) -> Iterator[Trial]:
        """Every group, k and operation, with the treatment and all of its controls."""
        wanted = _dimensions(self.k, setting.model.architecture)
        params = setting.end if setting.from_random else setting.start
        inputs = Inputs(tokens=self.tokens, length=self.length)
        bases: dict[object, Tensor] = {
            frame.place: frame.space.basis for frame in input_frames(setting, params, wanted[-1], inputs)
        }
        prediction = prediction_frame(setting, params, wanted[-1])
        bases[prediction.place] = prediction.space.basis
        given = given_subspaces(self.frames, setting, wanted[-1])
        for group in groups:
            names = {matrix.parameter for matrix in group.matrices}
            before = _held(setting.start, evaluation.params, names)
            parts = _Parts(self, setting.seed, group, bases, before, evaluation.params)
            yield from parts.trials(wanted)
            for subspace in given:
                served = tuple(matrix for matrix in group.matrices if subspace.at(matrix) is not None)
                if served:
                    inside = replace(
                        parts,
                        group=Group(group.place, served),
                        bases={(subspace.name, at): space.basis for at, space in subspace.spaces.items()},
                        place=partial(_given_place, subspace),
                    )
                    yield from inside.trials(frame_dimensions((self.frames or {})[subspace.name], wanted))

    def transplanted(
        self, setting: Setting, evaluation: Evaluation, groups: Sequence[Group]
    ) -> Iterator[Trial]:
        """All weights, and every group, with the same updates turned."""
        architecture, params = setting.model.architecture, evaluation.params
        after = _held(setting.end, params, params)
        whole = group_of(architecture, kinds_of(architecture), None)
        for kind, group in [("weights", whole), *(("delta", group) for group in groups)]:
            others = kind == "weights"
            edit = Transplant(after, group.matrices, others=others)
            exact = _exact(params, group.matrices)
            arms = [Arm(kind, edit, {"frobenius norm": change_norm(edit, exact, group.matrices)})]
            for draw in range(self.controls["rotated"]):
                text = f"{setting.seed} rotated {draw}"
                turned = replace(edit, rotation=partial(_haar_at, text, architecture.d_model, None))
                norm = change_norm(turned, exact, group.matrices)
                arms.append(Arm("rotated", turned, {"frobenius norm": norm}, "frobenius norm", draw))
            # Of another dose, as the controls of both have the same place and name.
            yield Trial(group.place, "replace" if others else "transplant", arms[0], arms[1:])
        kept = {matrix.parameter for matrix in architecture.matrices}
        if self._whole and any(not torch.equal(after[name], params[name]) for name in params.keys() - kept):
            yield self._rest(setting.seed, params, after, kept)

    def _rest(self, seed: int, params: Params, after: Params, kept: Collection[str]) -> Trial:
        """All parameters but those kept, with the same updates turned."""
        exact = {name: weight if name in kept else weight.double() for name, weight in params.items()}

        def arm(kind: str, edit: TransplantRest, draw: int = 0) -> Arm:
            edited = edit.applied(exact)
            squares = [(edited[name] - exact[name]).square().sum() for name in exact.keys() - kept]
            norm = float(torch.stack(squares).sum().sqrt())
            matched = "frobenius norm" if edit.turn else ""
            return Arm(kind, edit, {"frobenius norm": norm}, matched, draw)

        controls = [
            arm("rotated", TransplantRest(after, kept, partial(_turned, f"{seed} rotated {draw}")), draw)
            for draw in range(self.controls["rotated"])
        ]
        return Trial(
            {"matrix": REST, "role": ""}, "replace", arm(REST, TransplantRest(after, kept)), controls
        )

    @property
    def _whole(self) -> bool:
        """Whether the transplants add up to all weights."""
        return self.transplants is None and self.layers is None

    def _groups(self, architecture: Architecture) -> list[Group]:
        asked = reads_and_writes(architecture) if self.groups is None else self.groups
        return grouped(architecture, asked, self.layers, "groups")

    def _transplants(self, architecture: Architecture) -> list[Group]:
        kinds = kinds_of(architecture)
        every = [kinds, *reads_and_writes(architecture), *([kind] for kind in kinds)]
        asked = every if self.transplants is None else self.transplants
        return grouped(architecture, asked, self.layers, "transplants")

    def _surgeries(self, architecture: Architecture) -> int:
        wanted = _dimensions(self.k, architecture)
        of_frames = [len(frame_dimensions(source, wanted)) for source in (self.frames or {}).values()]
        places = len(self._groups(architecture)) * (len(wanted) + sum(of_frames))
        return places * len(self.operations) * (1 + sum(self.controls.get(kind, 0) for kind in RANDOM))


@plain_dataclass(frozen=True, eq=False)
class _Parts:
    """The parts of one group's update inside subspaces."""

    asked: DeltaSurgery
    seed: int
    group: Group
    bases: Mapping[object, Float[Tensor, "d k"]]
    before: Params
    params: Params
    place: Callable[[ResidualMatrix], Any] = place_of  # whose subspace serves a matrix, by name and place

    def trials(self, wanted: Sequence[int]) -> Iterator[Trial]:
        """Every k and operation."""
        matrices, controls = self.group.matrices, self.asked.controls
        held = {
            matrix: self._energies(matrix, self._top(wanted[-1], matrix)).cumsum(0) for matrix in matrices
        }
        drawn = [
            {
                matrix: self._energies(matrix, self._haar("random_energy", draw, None, matrix)).cumsum(0)
                for matrix in matrices
            }
            for draw in range(controls.get("random_energy", 0))
        ]
        names = dict.fromkeys(self.place(matrix)[0] for matrix in matrices)
        for k in wanted:
            energies = {matrix: float(sums[:k][-1]) for matrix, sums in held.items()}
            filling = [
                {matrix: filled(sums[matrix], energies[matrix]) for matrix in matrices} for sums in drawn
            ]
            for operation in self.asked.operations:
                arm = partial(self._arm, operation, k)
                yield Trial(
                    {**self.group.place, "subspace": "+".join(names), "k": k},
                    operation,
                    arm("top", partial(self._top, k)),
                    [
                        arm("random_k", partial(self._haar, "random_k", draw, k), draw)
                        for draw in range(controls.get("random_k", 0))
                    ]
                    + [
                        arm("random_energy", partial(self._filling, draw, numbers), draw)
                        for draw, numbers in enumerate(filling)
                    ],
                    "less" if operation == "keep" else "more",
                )

    def _arm(self, operation: Operation, k: int, kind: str, space: Space, draw: int = 0) -> Arm:
        factor = self.asked.factor if operation == "scale" else float(operation == "keep")
        assert factor is not None
        edit = Surgery(self.before, self.group.matrices, space, factor, float(operation != "keep"))
        dimension = max(self._top(k, matrix).shape[1] for matrix in self.group.matrices)
        sizes: dict[str, float] = {} if kind == "random_energy" else {"dimension": float(dimension)}
        if kind != "random_k":
            sizes["removed energy"] = self._applied(edit)
        return Arm(kind, edit, sizes, {"random_k": "dimension"}.get(kind, "removed energy"), draw)

    def _applied(self, edit: Surgery) -> float:
        """The energy inside, from the edited weights: the change that `keep` leaves, or that others make."""
        exact = _exact(self.params, edit.matrices)
        edited, other = edit.applied(exact), exact if edit.outside else self.before
        changes = [
            (matrix, matrix.of(edited).double() - matrix.of(other).double()) for matrix in edit.matrices
        ]
        squares = [residual_side(matrix, change, self.params).square().sum() for matrix, change in changes]
        return float(torch.stack(squares).sum())

    def _energies(self, matrix: ResidualMatrix, basis: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
        """‖dW b‖² of every direction for a matrix that reads; ‖bᵀ dW‖² for one that writes."""
        delta = matrix.of(self.params).double() - matrix.of(self.before).double()
        side = residual_side(matrix, delta, self.params)
        return (side @ basis.to(side)).square().sum(0)

    def _top(self, k: int, matrix: ResidualMatrix) -> Float[Tensor, "d k"]:
        return self.bases[self.place(matrix)][:, :k]

    def _haar(self, kind: str, draw: int, columns: int | None, matrix: ResidualMatrix) -> Tensor:
        d, most = self.bases[self.place(matrix)].shape
        number = min(columns, most) if kind == "random_k" and columns is not None else columns
        return haar_basis(f"{self.seed} {kind} {draw} {self.place(matrix)}", d, number)

    def _filling(
        self, draw: int, filling: Mapping[ResidualMatrix, tuple[int, float]], matrix: ResidualMatrix
    ) -> Float[Tensor, "d k"]:
        columns, length = filling[matrix]
        basis = self._haar("random_energy", draw, columns, matrix)
        return torch.cat([basis[:, :-1], length * basis[:, -1:]], 1)


def interaction(trials: Sequence[Trial], evaluation: Evaluation) -> Iterator[Row]:
    """The effect of all weights less those of reads, writes and the rest alone; paired, prompt by prompt.

    A part that did not move is not among the trials and does nothing.
    """
    changes: list[Samples] = []
    for trial in trials:
        part = trial.treatment.kind, trial.place["matrix"], trial.place["role"]
        if part in SIGNS:
            change = evaluation.changed_by(trial.treatment.edit)
            changes.append({effect: SIGNS[part] * values.double() for effect, values in change.items()})
    for effect in changes[0]:
        values = torch.stack([change[effect] for change in changes]).sum(0)
        yield row(
            f"{named(effect)}_interaction",
            float(values.mean()),
            n=len(values),
            unit=UNITS[effect],
            stderr=float(values.std()) / sqrt(len(values)) if len(values) > 1 else None,
            **arm_columns("weights", "replace"),
            **trials[0].place,  # of all weights
        )


def filled(sums: Float[Tensor, " d"], energy: float) -> tuple[int, float]:
    """The number of directions that hold this energy, and the length of the last; `sums` are cumulative.

    A column b of length c adds the part c² b bᵀ, and so c⁴ times the energy of its direction.
    """
    whole = min(int((sums < energy).sum()), len(sums) - 1)
    before = float(sums[whole - 1]) if whole else 0.0
    share = (energy - before) / (float(sums[whole]) - before)
    return whole + 1, min(1.0, share) ** 0.25


@lru_cache(maxsize=2)  # q, k and v ask for the same
def haar_basis(text: str, d: int, columns: int | None) -> Float[Tensor, "d columns"]:
    """The first columns (None: all) of a Haar-uniform orthogonal matrix that the text draws, in fp64.

    Source: Mezzadri (2007), Notices of the AMS 54:592: the signs of R's diagonal make the Q of QR uniform.
    """
    generator = torch.Generator().manual_seed(crc32(text.encode()))
    gaussian = torch.randn(d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian[:, :columns])
    return q * r.diagonal().sign()


def _haar_at(text: str, d: int, columns: int | None, matrix: ResidualMatrix) -> Float[Tensor, "d columns"]:
    """The same for all matrices with one subspace."""
    return haar_basis(f"{text} {place_of(matrix)}", d, columns)


def _given_place(subspace: GivenSubspace, matrix: ResidualMatrix) -> tuple[str, str | None]:
    return subspace.name, subspace.place(matrix)


def _turned(text: str, name: str, delta: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A vector in a random direction of its space; other tensors turned along the last axis, all alike."""
    size = delta.shape[-1] if delta.ndim else 1
    if delta.ndim > 1:
        return delta @ haar_basis(f"{text} {REST} {size}", size, None).T.to(delta)
    generator = torch.Generator().manual_seed(crc32(f"{text} {name}".encode()))
    direction = torch.randn(delta.shape, generator=generator, dtype=torch.float64).to(delta)
    return delta.norm() * direction / direction.norm()


def _dimensions(k: int | list[int] | None, architecture: Architecture) -> list[int]:
    """The dimensions asked for; by default 1, 4, 16 and 64 of 128, and the same shares of other widths."""
    d = architecture.d_model
    return dimensions([max(1, d // part) for part in (128, 32, 8, 2)] if k is None else k, d)


def _held(params: Params, like: Params, names: Collection[str]) -> Params:
    """Parameters in memory, with the dtype and on the device of others."""
    return {name: params[name].to(like[name]) for name in names}


def _exact(params: Params, matrices: Sequence[ResidualMatrix]) -> Params:
    """These weights in fp64: in fp32 rounding would change the size of a small update."""
    return {**params, **{matrix.parameter: params[matrix.parameter].double() for matrix in matrices}}
