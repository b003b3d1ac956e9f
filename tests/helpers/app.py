"""Runs `run.py` as a user does, in a process of its own, small enough for a test."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm import warm

ROOT = Path(__file__).parents[2]
SMALL = (
    "model.d_model=32 model.d_mlp=64 model.layers=2 model.heads=2"
    " model.pretraining.steps=4 model.pretraining.batch_size=4 model.pretraining.max_length=32"
    " +model.pretraining.log_every=2"
    " training.steps=2 training.batch_size=4 training.max_length=48 training.log_every=1"
    " probe.rsf.tokens=256 probe.behaviour.tokens=256 device=cpu"
).split()
WORLD = "+data.documents=60 +data.pairs=24 +data.heldout=8".split()
BEHAVIOUR = [*(override for override in SMALL if "rsf" not in override), "probe=[behaviour]"]  # that alone
HARMLESS = {"COLUMNS", "MLFLOW_TRACKING_URI", "PATH", "PYTHONPATH", "SLURM_CONF"}  # no import reads them


@dataclass(frozen=True)
class Ended:
    """The end of a run."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def record(self) -> Path:
        """The directory that it names at its end."""
        return next(Path(line[8:]) for line in self.out.splitlines() if line.startswith("record: "))


def run(directory: Path, *arguments: str, before: Sequence[str] = (), **variables: str) -> Ended:
    """Run `run.py` in `directory`; `before` is a command that runs the command behind it.

    The run is a fork of a process that has imported the libraries, unless it has a command before it or
    variables that their imports read.
    """
    if before or set(variables) - HARMLESS:
        return fresh_run(directory, *arguments, before=before, **variables)
    return Ended(*warm().run(directory, ROOT / "run.py", arguments, environment(variables)))


def fresh_run(directory: Path, *arguments: str, before: Sequence[str] = (), **variables: str) -> Ended:
    """`run` in a process that imports the libraries itself."""
    ended = subprocess.run(
        [*before, sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=directory,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=1800,  # ends a run that hangs; not a measure of speed
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what changes where a run looks and publishes.

    A variable that is given as empty is taken out.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HYDRA_"))}
    asked = kept | {"COLUMNS": "300", "HF_HUB_OFFLINE": "1", **variables}
    return {name: value for name, value in asked.items() if value}


def done(outputs: Path, stage: str) -> set[Path]:
    """The finished stages of one kind."""
    return {path.parent for path in (outputs / stage).glob("*/DONE")}


def status(record: Path) -> dict[str, Any]:
    return json.loads((record / "status.json").read_text())
