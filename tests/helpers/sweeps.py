"""Sweeps started and watched as by a user, with `run.py -m` and `python -m runners.launcher`."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from app import ROOT, SMALL, WORLD, Ended, environment, run
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

TINY = [*(override for override in SMALL if not override.startswith("probe.")), *WORLD, "probe=[]"]


@dataclass(frozen=True)
class Place:
    """A working directory for sweeps, with the environment variables of their commands."""

    home: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def sweep(self, *arguments: str) -> Ended:
        """Start a sweep of tiny runs."""
        return run(self.home, *TINY, *arguments, "-m", **self.variables)

    def started(self, *arguments: str) -> Path:
        """Start a sweep, and return its directory at once."""
        ended = self.sweep(*arguments, "hydra.launcher.detach=true")
        assert ended.code == 0, ended.err + ended.out
        return directory(ended)

    def command(self, name: str, sweep: Path, *more: str, **variables: str) -> Ended:
        """`python -m runners.launcher NAME SWEEP`, run from another directory than the sweep's own."""
        with self.popen(name, sweep, *more, **variables) as process:
            out, err = process.communicate(timeout=1800)
        return Ended(process.returncode, out, err)

    def popen(self, name: str, sweep: Path, *more: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "runners.launcher", name, str(sweep), *more],
            cwd="/",
            env=environment({**self.variables, "PYTHONPATH": str(ROOT), **variables}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def runs(self, experiment: str) -> tuple[Run, dict[str, Run]]:
        """The parent of the only sweep of an MLflow experiment, and its children by seed."""
        client = MlflowClient(f"sqlite:///{self.home}/outputs/mlflow.db")
        stored = client.get_experiment_by_name(experiment)
        assert stored is not None
        runs = client.search_runs([stored.experiment_id])
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if run is not parent]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
        by_seed = {run.data.params["seed"]: run for run in children}
        assert len(by_seed) == len(children)
        return parent, by_seed

    def statuses(self, experiment: str) -> tuple[str, dict[str, str]]:
        """The MLflow statuses of an experiment's sweep and of its runs by seed."""
        parent, children = self.runs(experiment)
        return parent.info.status, {seed: run.info.status for seed, run in children.items()}


def directory(ended: Ended) -> Path:
    return next(Path(line[7:]) for line in ended.out.splitlines() if line.startswith("sweep: "))


def events(sweep: Path, number: int = 0) -> list[dict[str, Any]]:
    path = sweep / str(number) / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def states(sweep: Path, number: int = 0) -> list[str]:
    return [event["state"] for event in events(sweep, number)]


def steps(sweep: Path, number: int = 0, key: str = "train/loss") -> list[int]:
    """The steps of a curve in a run's record, in the order in which they were written."""
    path = sweep / str(number) / "record/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    points = [json.loads(line) for line in lines if line.endswith("\n")]
    return [point["step"] for point in points if point["key"] == key]


def rows(ended: Ended) -> dict[int, str]:
    """The state of each job in the output of `status`."""
    cells = re.findall(r"^│ (\d+) +│ \S+ +│ ([A-Z ]+?) +│", ended.out, re.MULTILINE)
    return {int(number): state for number, state in cells}


def until(claim: Callable[[], object], seconds: float = 900) -> Any:
    """Wait until `claim` returns a true value, and return it; the limit only ends a test that hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := claim():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds:g} s")


def weights(home: Path, last: int, outputs: str = "outputs") -> dict[str, torch.Tensor]:
    """The final weights of the only training of `last` steps."""
    (path,) = (home / outputs / "training").glob(f"*/step-{last}/model.safetensors")
    return load_file(path)
