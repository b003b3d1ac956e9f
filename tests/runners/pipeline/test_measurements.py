from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small
import torch
from networks import save
from pandas.testing import assert_frame_equal
from stored import no_stage

from runners.pipeline.logged_stages import RESUMABLE, Stages
from runners.pipeline.measurements import Measured, plain
from runners.pipeline.store import signature, stage
from runners.tracking.record import Record
from weightgeom.causal.effects import Effects
from weightgeom.declarations import ProbeDeclaration
from weightgeom.estimators.per_matrix import as_probe
from weightgeom.interfaces import Intervention, Log, Setting, Stage
from weightgeom.interventions.rank1 import Rank1
from weightgeom.interventions.steer import Steer
from weightgeom.interventions.surgery import DeltaSurgery
from weightgeom.models.residual import Architecture
from weightgeom.objectives.ce import CE
from weightgeom.params import Params
from weightgeom.probes.rotation import Rotation
from weightgeom.probes.rsf import RSF
from weightgeom.probes.sparsity import Sparsity
from weightgeom.table import Row
from weightgeom.training.config import Training
from weightgeom.trajectory import Base, Trajectory
from weightgeom.uncertainty.state_edits import StateEditSettings


@dataclass(frozen=True)
class Narrow:
    size: int = 1


@dataclass(frozen=True)
class Wide:
    size: int = 1


@dataclass(frozen=True)
class Probe:
    inner: Any


class Bare:
    pass


def test_two_objects_with_the_same_fields_differ_by_their_classes_however_deep() -> None:
    things = [Probe(Narrow()), Probe(Wide()), Probe([Narrow()]), Probe({"a": Wide()}), Narrow(), Bare()]
    assert len({signature({"it": plain(thing)}) for thing in things}) == len(things)
    here = Probe.__module__
    assert plain(Probe((Narrow(2), None))) == {
        "class": f"{here}.Probe", "inner": [{"class": f"{here}.Narrow", "size": 2}, None]
    }  # fmt: skip
    assert plain(CE()) == {"class": "weightgeom.objectives.ce.CE", "train_on": "auto"}


def test_a_function_is_its_name_with_the_arguments_that_it_has() -> None:
    assert plain(Probe(partial(torch.optim.AdamW, lr=0.5)))["inner"] == {
        "function": "torch.optim.adamw.AdamW", "arguments": [], "lr": 0.5
    }  # fmt: skip
    assert plain(plain) == "runners.pipeline.measurements.plain"


def test_a_trajectory_without_step_0_starts_at_its_first_checkpoint(tmp_path: Path) -> None:
    steps = {step: save("llama", tmp_path / f"checkpoint-{step}", seed=step) for step in (100, 200)}

    def stages(prefix: str, code: str) -> Stage:
        return no_stage

    trajectory = Trajectory("revisions", steps)
    base = Base(steps[200], "base", trajectory)
    examples = small.WORLD.examples()
    setting = Measured(stages, 0, "cpu", None, Training(), base, trajectory, "own", examples).setting
    name = setting.model.architecture.matrices[0].parameter
    assert setting.last == 200 and not torch.equal(setting.start[name], setting.end[name])
    torch.testing.assert_close(setting.start[name], setting.model.params(steps[100])[name], rtol=0, atol=0)


@dataclass(frozen=True)
class Interrupted:
    """A probe that ends at one of its measurements, as a signal would end it."""

    probe: RSF
    at: int
    divisible: bool

    @property
    def declaration(self) -> ProbeDeclaration:
        return replace(self.probe.declaration, divisible=self.divisible)

    def check(self, architecture: Architecture) -> None:
        pass

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        measure, calls = self.probe.measurement(setting), 0

        def counted(params: Params) -> list[Row]:
            nonlocal calls
            calls += 1
            if calls == self.at:
                raise KeyboardInterrupt
            return measure(params)

        return counted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divisible", "ends", "begun", "all_steps"),
    [  # one that is not divisible measures the checkpoint before its first new one, too
        (False, (3, 3), [1, 2, 2, 3], [1, 2, 2, 3, 2, 3, 4]),
        (True, (3, 2), [1, 2, 3], [1, 2, 3, 3, 4]),
    ],
)
def test_an_interrupted_measurement_goes_on_behind_the_checkpoints_that_it_has_measured(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    divisible: bool,
    ends: tuple[int, int],
    begun: list[int],
    all_steps: list[int],
) -> None:
    steps = {step: save("llama", tmp_path / f"step-{step}", seed=step) for step in range(4)}
    examples = small.WORLD.examples()
    seen: list[int] = []

    def measured(outputs: str, probe: Any) -> pd.DataFrame:
        def make(name: str, specification: Any, work: Callable[[Path, Log], None], steps: int) -> Path:
            def logged(directory: Path) -> None:
                work(directory, lambda metrics, step: seen.append(step))

            return stage(tmp_path / outputs, name, {"one": 1}, logged, RESUMABLE)

        trajectory = Trajectory("steps", steps)
        base = Base(steps[0], "base", trajectory)
        parts = 0, "cpu", None, Training(), base, trajectory, "own", examples
        return Measured(lambda prefix, code: make, *parts).table("rsf", probe)

    probe = RSF(increments=True, tokens=256, length=16, prompts=0, resamples=2)  # reads the checkpoint before
    undisturbed = measured("whole", probe)
    seen.clear()
    for at in ends:  # the second time behind one new one
        with pytest.raises(KeyboardInterrupt):
            measured("cut", Interrupted(probe, at, divisible))
    assert seen == begun
    (kept,) = (tmp_path / "cut/rsf").glob("*/checkpoint-2.rows")
    kept.write_bytes(kept.read_bytes().replace(b"2", b"3", 1))
    resumed = measured("cut", Interrupted(probe, 9, divisible))
    assert "checkpoint-2.rows is not the file that was written" in caplog.text
    assert seen == all_steps
    assert_frame_equal(resumed, undisturbed, check_exact=True)
    (done,) = (tmp_path / "cut/rsf").glob("*/DONE")
    assert not list(done.parent.glob("checkpoint-*"))


def test_probes_of_pairs_are_measured_in_the_walk_of_the_first_unless_they_are_made(tmp_path: Path) -> None:
    steps = {step: save("llama", tmp_path / f"step-{step}", seed=step) for step in range(3)}
    trajectory = Trajectory("steps", steps)
    parts = 0, "cpu", None, Training(), Base(steps[0], "base", trajectory), trajectory, "own"
    nothing: dict[str, Any] = {"params": {}, "tags": {}, "inputs": [], "tracking_uri": "sqlite:///none"}
    probes: dict[str, Any] = {"sparsity": as_probe(Sparsity(rank=4)), "rotation": Rotation(draws=2)}

    def measured(outputs: str, asked: dict[str, Any]) -> tuple[Measured, dict[str, pd.DataFrame]]:
        record = Record.create(tmp_path / outputs / "record", experiment="e", name="n", **nothing)
        stages = Stages(tmp_path / outputs, record, "", "code")
        tables = Measured(lambda prefix, code: stages, *parts, small.WORLD.examples(), asked)
        return tables, {name: tables.table(name, probe) for name, probe in asked.items()}

    together, found = measured("together", probes)
    assert not together._walked
    for name, probe in probes.items():
        _, alone = measured("alone", {name: probe})
        assert_frame_equal(alone[name], found[name], check_exact=True)
    again, _ = measured("alone", {"sparsity": as_probe(Sparsity(rank=3)), "rotation": probes["rotation"]})
    assert not again._walked  # of a table that is made there is no walk


EFFECTS = Effects(tokens=60, length=12, pairs=2, questions=2)
TEXT: dict[str, Any] = {"tokens": 240, "effects": EFFECTS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "intervention"),
    [
        ("rank1", Rank1(controls={"random": 1}, level=0.5, strengths=[0.1, 0.3], **TEXT)),
        (
            "surgery",
            DeltaSurgery(controls={"random_k": 1, "random_energy": 1, "rotated": 1}, level=0.5, k=4, **TEXT),
        ),
        ("steer", Steer(strengths=[1.0, 2.0], prompted=StateEditSettings(random=2, level=0.34, prompts=8))),
    ],
)
def test_an_interrupted_intervention_goes_on_behind_its_finished_trials(
    name: str, intervention: Intervention, tmp_path: Path
) -> None:
    steps = {step: save("llama", tmp_path / f"step-{step}", seed=step) for step in range(2)}
    grouped = replace(small.WORLD, groups=("known", "heldout"), group_size=8).examples()
    examples = replace(grouped, abstentions=[" perhaps"])  # a word of the networks' tokenizer
    attempts: list[list[int]] = []

    def measured(outputs: str, until: int | None = None) -> pd.DataFrame:
        attempts.append([])

        def log(metrics: Any, arm: int) -> None:
            attempts[-1].append(arm)
            if arm == until:
                raise KeyboardInterrupt

        def make(name: str, specification: Any, work: Callable[[Path, Log], None], steps: int) -> Path:
            return stage(tmp_path / outputs, name, {"one": 1}, lambda path: work(path, log), RESUMABLE)

        trajectory = Trajectory("steps", steps)
        base = Base(steps[0], "base", trajectory)
        parts = 0, "cpu", None, Training(), base, trajectory, "own", examples
        return Measured(lambda prefix, code: make, *parts).effects(name, intervention)

    undisturbed = measured("whole")
    arms = len(attempts[0])
    assert attempts == [list(range(1, arms + 1))]
    for until in (arms // 2 + 1, arms):
        with pytest.raises(KeyboardInterrupt):
            measured("cut", until)
    resumed = measured("cut")
    _, first, second, third = attempts
    assert first == list(range(1, arms // 2 + 2))
    assert second == list(range(second[0], arms + 1)) and 1 < second[0] <= len(first)
    assert third == list(range(third[0], arms + 1)) and third[0] > len(first)  # the last trial alone
    assert_frame_equal(resumed, undisturbed, check_exact=True)
    (done,) = (tmp_path / "cut" / name).glob("*/DONE")
    assert not list(done.parent.glob("checkpoint-*"))
