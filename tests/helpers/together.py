"""Trainings one after another in the same processes, which import torch once for all of them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightgeom.interfaces import Log, Objective
from weightgeom.interruption import Request
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit
from weightgeom.training.processes import load_on


@dataclass(frozen=True)
class Task:
    """A training of the network in `base`."""

    objective: Objective
    training: Training
    base: Path
    examples: Examples
    directory: Path


def train(tasks: Sequence[Task], log_metrics: Log, request: Request) -> None:
    """Train each task; its metrics have the name of its directory before them."""
    for task in tasks:
        before = dict(os.environ)  # accelerate's settings of the sharding are variables
        fit(
            task.objective,
            *load_on(task.base, "cpu", task.training.shard),
            task.examples,
            task.training,
            task.directory,
            name="it",
            seed=0,
            device="cpu",
            start=task.base,
            log_metrics=partial(_log, task.directory.name, log_metrics),
            request=request,
        )
        os.environ.clear()
        os.environ.update(before)


def _log(name: str, log_metrics: Log, metrics: Mapping[str, float], step: int) -> None:
    log_metrics({f"{name}|{key}": value for key, value in {"step": step, **metrics}.items()}, step)
