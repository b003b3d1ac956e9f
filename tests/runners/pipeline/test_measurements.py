from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import small
import torch
from networks import save
from stored import no_stage

from runners.pipeline.measurements import Measured, plain
from runners.pipeline.store import signature
from weightgeom.interfaces import Stage
from weightgeom.objectives.ce import CE
from weightgeom.training.config import Training
from weightgeom.trajectory import Base, Trajectory


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
