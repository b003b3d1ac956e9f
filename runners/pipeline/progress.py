"""Progress of a run through its stages: their numbers, a bar or lines, and an estimate of the time left."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from runners.disk import read_object
from runners.summary.durations import duration
from runners.tracking.redaction import redacted

log = logging.getLogger(__name__)
EVERY = 30.0  # seconds between two lines, where there is no terminal
LOOKED_AT = 20  # earlier stages, the newest first
# Keys of a stage's specification that hardly change the time it takes.
VARYING = {"data", "seed", "text", "trajectory", "from_random", "steps", "code", "libraries"}

Advance = Callable[[int, Mapping[str, float]], None]
"""Takes the current step of a stage and its metrics."""


@dataclass(frozen=True)
class Foreseen:
    """A stage of a run before it begins; `specification` is the known part of its key."""

    name: str
    label: str  # the name with its subject, such as `rsf (pretraining)`
    made: bool
    steps: int
    specification: Mapping[str, object]


@dataclass
class Progress:
    """The stages of a run in order, and the number of the current one, which `begin` counts."""

    outputs: Path
    stages: Sequence[Foreseen] = ()
    number: int = 0
    kept: list[str] = field(default_factory=list)  # labels of the stages that are finished
    current: str = ""  # label of the stage that is being made
    directory: Path | None = None  # of the stage that is being made

    def begin(self, label: str) -> None:
        """The next stage."""
        self.number += 1
        self.current, self.directory = label, None

    def end(self) -> None:
        """The current stage is finished."""
        self.kept.append(self.current)
        self.current, self.directory = "", None

    @property
    def head(self) -> str:
        """Such as `2 of 6 training`; without the total where the stages are not foreseen."""
        total = f" of {max(self.number, len(self.stages))}" if self.stages else ""
        return f"{self.number}{total} {self.current}"

    def left(self) -> tuple[float, list[str]]:
        """Seconds for the stages after the current one, and those that nothing like them tells of."""
        return seconds_of(self.outputs, self.stages[self.number :])

    def interrupted(self, command: str) -> Iterator[str]:
        """The finished stages, the state of the one that was being made, and the command that goes on."""
        if self.current:
            yield f"interrupted in stage {self.head}"
        yield f"kept under {self.outputs}: {', '.join(self.kept) or 'no stage yet'}"
        if self.directory is not None:
            names = [path.name.removeprefix("checkpoint-") for path in self.directory.glob("checkpoint-*")]
            states = [int(name) for name in names if name.isdigit()]  # others are not written to their end
            measured = sum(name.endswith(".rows") for name in names)
            state = (
                f"goes on from step {max(states)}"
                if states
                else f"goes on behind the {measured} checkpoints or trials that it has measured"
                if measured
                else "starts again, as it has saved no state"
            )
            yield f"{self.current} {state}"
        if command:
            yield f"the same command goes on: {command}"


def seconds_of(outputs: Path, stages: Sequence[Foreseen]) -> tuple[float, list[str]]:
    """Seconds that the stages not made yet take by earlier ones like them, and the labels of the others."""
    times = {stage.label: earlier(outputs, stage) for stage in stages if not stage.made}
    return sum(time or 0.0 for time in times.values()), [
        label for label, time in times.items() if time is None
    ]


def earlier(outputs: Path, stage: Foreseen) -> float | None:
    """Seconds by the newest finished stage that was asked for in the same way; None if there is none.

    Two stages are alike that differ in their data, seed or number of checkpoints, which counts in proportion.
    A stage was begun when its spec.json was written, and finished with its DONE.
    """
    wanted = json.loads(json.dumps(redacted(stage.specification), default=dict))
    wanted = {key: value for key, value in wanted.items() if key not in VARYING}
    finished = {}
    for path in (outputs / stage.name).glob("*/DONE"):
        with suppress(OSError):
            finished[path.parent] = path.stat().st_mtime
    for directory in sorted(finished, key=finished.__getitem__, reverse=True)[:LOOKED_AT]:
        with suppress(OSError, ValueError, TypeError):  # a damaged one tells no time
            path = directory / "spec.json"
            spec = read_object(path, "")
            if wanted and all(spec.get(key) == value for key, value in wanted.items()):
                taken = finished[directory] - path.stat().st_mtime
                return taken * stage.steps / len(spec["steps"]) if "steps" in spec else taken
    return None


@contextmanager
def shown(progress: Progress, steps: int, every: float = EVERY) -> Iterator[Advance]:
    """Shows the current stage of `steps` steps: a bar in a terminal, elsewhere a line every half minute."""
    from rich import get_console

    meter = Meter(progress, steps)
    with _bar(meter) if get_console().is_terminal else _lines(meter, every) as advance:
        yield advance


class Meter:
    """The step of a stage, and the time that is left."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps
        self.step, self.loss = 0, ""
        self.first: tuple[int, float] | None = (
            None  # the first step with its time: a training may go on from one
        )
        self.later, self.untimed = progress.left()
        place = progress.number - 1
        mine = progress.stages[place : place + 1]
        known = earlier(progress.outputs, mine[0]) if mine and mine[0].label == progress.current else None
        self.expected, self.began = known, monotonic()

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the current step."""
        if self.first is None:
            self.first = (step - 1, self.began) if step <= 1 else (step, monotonic())
        self.step = step
        if "loss" in metrics:
            self.loss = f"loss {metrics['loss']:.3f}"

    def left(self) -> float | None:
        """Seconds left of this stage, in proportion to its steps; None before there is an estimate."""
        now = monotonic()
        if self.first is not None and self.step > self.first[0]:
            done, since = self.step - self.first[0], now - self.first[1]
            return since / done * (self.steps - self.step)
        return None if self.expected is None else max(0.0, self.expected - (now - self.began))

    def rest(self) -> str:
        """Such as `30 s left, 3 min in all` or `30 s left, then 2 more stages`."""
        left = self.left()
        if left is None:
            return ""
        later = len(self.progress.stages) - self.progress.number
        here = f"{duration(left)} left"
        if later <= 0 or (not self.untimed and not self.later):
            return here
        if not self.untimed:
            return f"{here}, {duration(left + self.later)} in all"
        return f"{here}, then {later} more"


@contextmanager
def _bar(meter: Meter) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    head, fields = TextColumn("{task.description}"), TextColumn("{task.fields[rest]}")
    with Bar(head, BarColumn(12), MofNCompleteColumn(), fields, TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task(meter.progress.head, total=meter.steps, rest=meter.rest(), loss="")

        def advance(step: int, metrics: Mapping[str, float]) -> None:
            meter.advance(step, metrics)
            bar.update(task, completed=step, rest=meter.rest(), loss=meter.loss)

        yield advance


@contextmanager
def _lines(meter: Meter, every: float) -> Iterator[Advance]:
    ended = Event()

    def line() -> None:
        facts = [f"{meter.step} of {meter.steps}", meter.loss, meter.rest()]
        log.info("stage %s: %s", meter.progress.head, ", ".join(filter(None, facts)))

    def repeat() -> None:
        while not ended.wait(every):
            line()

    thread = Thread(target=repeat, name="progress", daemon=True)
    line()
    thread.start()
    try:
        yield meter.advance
    finally:
        ended.set()
        thread.join(1.0)
