from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from runners.pipeline.measurements import plain
from runners.pipeline.store import signature
from weightgeom.objectives.ce import CE


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
