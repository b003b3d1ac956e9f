"""Stages with their logged metrics: live while they are made, or again from their own log."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any, TextIO

from runners.disk import write_atomically
from runners.pipeline.fingerprint import libraries, named_files
from runners.pipeline.progress import Foreseen, Progress, shown
from runners.pipeline.store import signature, stage
from runners.signals import Interruption
from runners.tracking.record import Record
from weightgeom.interfaces import Log

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"  # of a stage: the metrics logged while it was made
RESUMABLE = "checkpoint-*"  # the states of transformers' trainers, from which the work of a stage goes on


@dataclass(frozen=True)
class Stages:
    """Makes stages whose metrics go into the record, live or, for a stage made before, from its log."""

    outputs: Path
    record: Record | None  # None in a process that has none of its own
    prefix: str  # of the metrics' names
    code: str  # fingerprint of the code that the result depends on
    verify: bool = False  # read all files of a finished stage before it is used, and not once in a process
    interruption: Interruption | None = None
    progress: Progress = field(default_factory=lambda: Progress(Path()))
    of: str = ""  # the subject of the stages, behind their names where people read them

    def __call__(
        self, name: str, specification: Mapping[str, object], work: Callable[[Path, Log], None], steps: int
    ) -> Path:
        """The finished directory of a stage of `steps` steps; work that was cut goes on if it can."""
        fresh = False
        self.progress.begin(name + self.of)

        def logged(directory: Path) -> None:
            nonlocal fresh
            fresh = True
            self.progress.directory = directory
            file: TextIO | None = None
            with ExitStack() as stack:
                advance = stack.enter_context(shown(self.progress, steps))

                def log_metrics(metrics: Mapping[str, float], step: int) -> None:
                    nonlocal file
                    if file is None:
                        file = stack.enter_context(self._resumed(directory, step))
                    advance(step, metrics)
                    if metrics:
                        row = {"metrics": dict(metrics), "step": step, "time": time_ns() // 1_000_000}
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                        self._log(row)

                work(directory, log_metrics)

        key = _key(specification, self.code)
        with nullcontext() if self.interruption is None else self.interruption.stage():
            directory = stage(self.outputs, name, key, logged, RESUMABLE, self.verify)
        self.progress.end()
        if not fresh:
            for row in _metrics(directory):
                self._log(row)
        return directory

    def made(self, name: str, specification: Mapping[str, object]) -> bool:
        """Whether a stage is finished."""
        return _made(self.outputs, name, _key(specification, self.code))

    def aside(self, name: str, specification: Mapping[str, object], work: Callable[[Path], None]) -> Path:
        """The finished directory of a stage that another one needs, without metrics and progress."""
        return stage(self.outputs, name, _key(specification, self.code), work, verify=self.verify)

    def _resumed(self, directory: Path, step: int) -> TextIO:
        """The log of a stage's metrics from `step` on, open behind the rows that were before it.

        These go into the record, too; rows of steps that are now done again are dropped.
        """
        rows = [row for row in _metrics(directory) if row["step"] < step]
        path = directory / METRICS
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self._log(row)
        return path.open("a")

    def _log(self, row: dict[str, Any]) -> None:
        if self.record is None:
            return
        metrics = {f"{self.prefix}/{name}": value for name, value in row["metrics"].items()}
        self.record.log(metrics, row["step"], row["time"])


class Foretold(Exception):
    """Ends the forecast of a run at a stage that is still to be made, or is only looked at."""


@dataclass(frozen=True)
class Foresight:
    """Stands in for `Stages` before a run: adds each stage made or reused to `stages`, and makes none.

    With `through`, the stages behind a finished one are looked at as well; otherwise it is not read.
    """

    outputs: Path
    code: str
    stages: list[Foreseen]
    of: str = ""
    through: bool = False

    def __call__(
        self, name: str, specification: Mapping[str, object], work: Callable[[Path, Log], None], steps: int
    ) -> Path:
        """The finished directory of a stage.

        Raises:
            Foretold: if it is not made yet, and always without `through`.
        """
        key = _key(specification, self.code)
        directory, made = self.outputs / name / signature(key), _made(self.outputs, name, key)
        self.stages.append(Foreseen(name, name + self.of, made, steps, specification))
        if not (made and self.through):
            raise Foretold(str(directory))
        return directory

    def made(self, name: str, specification: Mapping[str, object]) -> bool:
        """Whether a stage is finished."""
        return _made(self.outputs, name, _key(specification, self.code))

    def aside(self, name: str, specification: Mapping[str, object], work: Callable[[Path], None]) -> Path:
        """No stage that another one needs is looked at."""
        raise Foretold(name)


def _made(outputs: Path, name: str, key: Mapping[str, object]) -> bool:
    return (outputs / name / signature(key) / "DONE").exists()


def _key(specification: Mapping[str, object], code: str) -> dict[str, object]:
    key = {**specification, "code": code, "libraries": libraries()}
    files = named_files(specification)
    return {**key, "files": files} if files else key


def _metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a stage's metrics; a last one that a kill has cut is left out, damaged ones are named."""
    path = directory / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"metrics": dict(row["metrics"]), "step": int(row["step"]), "time": int(row["time"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if line.endswith(b"\n"):
                log.warning("%s line %d is damaged and left out of the curves", path, number)
    return rows


def warn_if_memorised(directory: Path, table: "pd.DataFrame") -> None:
    """Log a warning if the held-out loss of a base is far above the loss of the stage that trained it.

    Far is more than 1 nat and more than half of the training loss, the mean of its last three log lines.
    `table` is a probe's; one without `heldout_ce` warns of nothing.
    """
    losses = [row["metrics"]["loss"] for row in _metrics(directory) if "loss" in row["metrics"]][-3:]
    rows = table[table["quantity"] == "heldout_ce"]
    if not losses or not len(rows):
        return
    trained, heldout = sum(losses) / len(losses), float(rows.loc[rows["step"].idxmax(), "value"])
    if heldout > trained + max(1.0, 0.5 * trained):
        log.warning(
            "the base has memorised its text: its loss is %.2f nats per token on held-out text and %.2f in"
            " training, so its subspaces and every z describe a memory; give it more text, or fewer"
            " model.pretraining.steps",
            *(heldout, trained),
        )
