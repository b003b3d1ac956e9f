"""Trials: a treatment with the controls that it is matched to, which is the only way an effect gets a row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, sqrt
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.causal.effects import STATE_UNITS, UNITS, Samples
from weightgeom.geometry.bootstrap import bootstrap_times
from weightgeom.geometry.nulls import rank_p_value
from weightgeom.interfaces import Keep, Log, unkept
from weightgeom.table import Row, arm_columns, given_name, row

TOLERANCES = {
    "frobenius norm": 1e-6,
    "output energy": 1e-4,
    "removed energy": 1e-4,
    "dimension": 0.0,
    "shift norm": 1e-5,
}
RESAMPLES = 200


@runtime_checkable
class Evaluator(Protocol):
    """Measures the effects of edits of one kind: of weights, or of states."""

    def changed_by(self, edit: Any) -> Samples:
        """The changes that the edit makes, prompt by prompt."""
        ...


@dataclass(frozen=True, eq=False)
class Arm:
    """One edit, of weights or of states: its `kind` (`activation`, `random`, ...), number and `sizes`.

    The number is among those of a kind. Sizes are by name, those of `TOLERANCES`; `matched` names the one in
    which a control must equal the treatment. `predicted` has the effects that are known to first order, in
    the effects' units.
    """

    kind: str
    edit: Any  # of the kind that the evaluator takes
    sizes: Mapping[str, float]
    matched: str = ""
    draw: int = 0
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Trial:
    """A treatment and its controls at one place (`layer matrix role subspace k` of a table) and one dose.

    `expected` is the alternative of its p-values: it changes more than the controls, or less.

    Raises:
        ValueError: if there is no control, or one is not matched to the treatment.
    """

    place: Mapping[str, Any]
    dose: str
    treatment: Arm
    controls: Sequence[Arm]
    expected: Literal["more", "less"] = "more"

    def __post_init__(self) -> None:
        """Refuse arms that cannot be compared."""
        if not self.controls:
            raise ValueError(f"{self.treatment.kind}@{self.dose} has no controls: an effect needs some")
        for arm in self.controls:
            size, wanted = arm.sizes[arm.matched], self.treatment.sizes[arm.matched]
            if not abs(size - wanted) <= TOLERANCES[arm.matched] * abs(wanted):
                raise ValueError(
                    f"{arm.kind}.{arm.draw}@{self.dose} at {dict(self.place)} has a {arm.matched} of"
                    f" {size:.8g} and the treatment one of {wanted:.8g}: a control must have the same"
                )


def check_controls(controls: int, level: float) -> None:
    """Raise ValueError if n controls cannot give a p-value of `level`: the smallest is 1 / (1 + n)."""
    needed = ceil(1 / level - 1e-9) - 1
    if controls < needed:
        raise ValueError(
            f"{controls} random controls give p-values of {1 / (1 + controls):.3g} at the least, and level is"
            f" {level:g}: ask for {needed} or more"
        )


def measured(
    trials: Iterable[Trial],
    evaluation: Evaluator,
    seed: int,
    log: Log,
    done: int = 0,
    keep: Keep = unkept,
) -> Iterator[Row]:
    """Rows of every arm and of every comparison; `log` gets the number of finished arms, from `done` on.

    With a setting's `keep`, an interrupted stage goes on behind its finished trials; `trials` must be the
    same in every attempt.

    Quantities of an arm: `kl_from_unedited`, and the change of each other effect as `<effect>_change`, with
    the standard error over prompts of the paired difference; `predicted_<effect>_change` to first order.
    Of a comparison, whose arm is `treatment@dose/kind of control`, for each of these: `_p_value`, that the
    treatment's absolute effect is one of the controls', by rank on the side that is `expected`;
    `_effect_size`, (|effect| - mean of the
    controls') / their standard deviation, and `_effect_size_low` and `_high`, its 95 % interval over
    prompts, by the bootstrap's percentiles. q-values come from `with_q_values`.
    """
    for trial in trials:
        yield from keep(partial(_trial_rows, trial, evaluation, seed, log, done))
        done += 1 + len(trial.controls)


def _trial_rows(trial: Trial, evaluation: Evaluator, seed: int, log: Log, done: int) -> list[Row]:
    rows: list[Row] = []
    changes: dict[str, list[Samples]] = {}
    for number, arm in enumerate((trial.treatment, *trial.controls), done + 1):
        change = evaluation.changed_by(arm.edit)
        control = arm is not trial.treatment
        rows += _arm_rows(trial, arm, arm.draw if control else None, change)
        changes.setdefault(arm.kind if control else "", []).append(change)
        log({}, number)
    (treatment,) = changes.pop("")
    for kind, controls in changes.items():
        if len(controls) > 1:
            rows += _comparison(trial, kind, treatment, controls, seed)
    return rows


def with_q_values(rows: Sequence[Row]) -> list[Row]:
    """The rows, with a `_q_value` for every `_p_value`, over the layers and matrices of one table.

    Families are comparisons of one effect with one kind of control at one dose and k; those of a given
    subspace are families of their own.
    Source: Benjamini & Hochberg (1995), J. R. Stat. Soc. B 57:289, as scipy has it.
    """
    from scipy.stats import false_discovery_control

    families: dict[tuple[Any, ...], list[Row]] = {}
    for entry in rows:
        if entry["quantity"].endswith("_p_value"):
            given = given_name(entry.get("subspace", ""))
            family = entry["quantity"], entry["dose"], entry["against"], entry.get("k"), given
            families.setdefault(family, []).append(entry)
    completed = list(rows)
    for family in families.values():
        for entry, q in zip(
            family, false_discovery_control([entry["value"] for entry in family]), strict=True
        ):
            quantity = entry["quantity"].removesuffix("p_value") + "q_value"
            completed.append({**entry, "quantity": quantity, "value": float(q)})
    return completed


def _arm_rows(trial: Trial, arm: Arm, draw: int | None, change: Samples) -> Iterator[Row]:
    place = {**arm_columns(arm.kind, trial.dose, draw=draw), **trial.place}
    for effect, values in change.items():
        yield row(
            named(effect),
            float(values.double().mean()),
            n=len(values),
            unit=(UNITS | STATE_UNITS)[effect],
            stderr=float(values.double().std()) / sqrt(len(values)) if len(values) > 1 else None,
            **place,
        )
        if effect in arm.predicted:
            predicted = arm.predicted[effect]
            yield row(
                f"predicted_{named(effect)}", predicted,
                n=len(values), unit=(UNITS | STATE_UNITS)[effect], **place
            )  # fmt: skip


def named(effect: str) -> str:
    """The table's name for the change of an effect by an edit."""
    return effect if effect == "kl_from_unedited" else f"{effect}_change"


def _comparison(
    trial: Trial, kind: str, treatment: Samples, controls: Sequence[Samples], seed: int
) -> Iterator[Row]:
    for effect, values in treatment.items():
        samples = torch.stack([values, *(control[effect] for control in controls)]).double()
        absolute = samples.mean(1).abs()
        arm = arm_columns(trial.treatment.kind, trial.dose, against=kind)
        place = {**arm, "n": len(controls), **trial.place}
        ranked = absolute if trial.expected == "more" else -absolute
        yield row(f"{named(effect)}_p_value", rank_p_value(ranked[0], ranked[1:]), **place)
        size = _effect_size(absolute[:, None])
        if not bool(size.isfinite().all()):
            continue  # controls that all do the same, such as nothing
        yield row(f"{named(effect)}_effect_size", float(size), **place)
        times = bootstrap_times(samples.shape[1], RESAMPLES, seed).double()
        if not len(times):
            continue
        sizes = _effect_size((samples @ times.T / samples.shape[1]).abs())
        sizes = sizes[sizes.isfinite()]
        if len(sizes):
            for end, quantile in (("low", 0.025), ("high", 0.975)):
                yield row(f"{named(effect)}_effect_size_{end}", float(sizes.quantile(quantile)), **place)


def _effect_size(absolute: Float[Tensor, "arm resample"]) -> Float[Tensor, " resample"]:
    """(|treatment| - mean of |controls|) over their standard deviation; the treatment is the first arm."""
    controls = absolute[1:]
    return (absolute[0] - controls.mean(0)) / controls.std(0)
