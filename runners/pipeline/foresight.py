"""The stages of a run before it begins: which are reused, and which are to be made."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from runners.pipeline.logged_stages import Foresight, Foretold
from runners.pipeline.progress import Foreseen
from weightgeom.bases.outline import HasOutline
from weightgeom.interfaces import Probe
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

if TYPE_CHECKING:
    from runners.pipeline.experiment import Experiment

PRETRAINING = " (pretraining)"


def foreseen(run: "Experiment", examples: Examples) -> tuple[list[Foreseen], Base | None]:
    """The stages of `run` in order, and its base if that needs no stage; nothing is made.

    Checkpoints of the hub are fetched, which is in any case the first that a run does.
    """
    stages: list[Foreseen] = []
    make = partial(forecast, run.outputs, stages, True)
    look = partial(forecast, run.outputs, stages, False)
    base = None
    with suppress(Foretold):
        base = run.prepared(make, examples)
    if base is None:
        return [*stages, *_behind_an_unmade_base(run, examples)], None
    ready = None if stages else base
    past, trained = run.past(base), None
    if past is not None:
        _measured(run, look, base, (past, base.identity), examples, run.suffix(past, base))
    if run.objective is not None:
        # Where it is not made, nothing that depends on it is: no stage has an empty identity in its key.
        trained = Trajectory("training", dict.fromkeys(run.training.save_steps(), base.directory)), ""
        with suppress(Foretold):
            trained = run.trained(make, base, run.objective, examples)
        _measured(run, look, base, trained, examples, "")
    for pair, names in zip(base.pairs, pairwise(past.stages if past is not None else ()), strict=False):
        assert pair.trajectory is not None
        probes = {name: probe for name, probe in run.probes.items() if probe.declaration.compares}
        _measured(run, look, pair, (pair.trajectory, pair.identity), examples, against(*names), probes)
    if run.interventions and (last := trained or (past and (past, base.identity))):
        measured = run.measured(look, base, *last, examples)
        for name, intervention in run.interventions.items():
            with suppress(Foretold):
                measured.effects(name, intervention)
    return stages, ready


def against(before: str, after: str) -> str:
    """The words behind the name of a stage that compares two stages of a chain."""
    return f" ({after} against {before})"


def _measured(
    run: "Experiment",
    look: "partial[Foresight]",
    base: Base,
    trajectory: tuple[Trajectory, str],
    examples: Examples,
    of: str,
    probes: Mapping[str, Probe] | None = None,
) -> None:
    measured = run.measured(look, base, *trajectory, examples, of)
    for name, probe in (run.probes if probes is None else probes).items():
        with suppress(Foretold):
            measured.table(name, probe)


def _behind_an_unmade_base(run: "Experiment", examples: Examples) -> Iterator[Foreseen]:
    """Names alone, as every key holds that of the base."""
    steps = [0, 1]
    if isinstance(run.model, HasOutline):
        steps = run.model.outline(examples, run.data).steps or ([0] if run.objective is None else [])
    of = "" if run.objective is None else PRETRAINING
    names = [(name, name + of) for name in run.probes] if steps else []
    trained = [] if run.objective is None else ["training", *run.probes]
    for name, label in [*names, *((name, name) for name in [*trained, *run.interventions])]:
        yield Foreseen(name, label, made=False, steps=1, specification={})


def forecast(
    outputs: Path, stages: list[Foreseen], through: bool, prefix: str, code: str, of: str = ""
) -> Foresight:
    """A maker of stages that makes none: with the first three arguments given, as `Foresight` has them."""
    return Foresight(outputs, code, stages, of, through)
