"""How the jobs of a sweep stand, by their own account and by that of who runs them, until all have ended."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from runners.launcher import local as supervisor
from runners.launcher import slurm
from runners.launcher.jobs import State
from runners.launcher.manifest import Sweep

log = logging.getLogger(__name__)
ACTIVE = {"PENDING", "RUNNING"}
AGAIN = {"RUNNING", "PENDING", "NODE_FAIL", "PREEMPTED", "REQUEUED", "RESIZING", "SUSPENDED", ""}
PATIENCE = 2.0  # seconds that a job must be out of the queue before that counts
LONGER = 15.0  # ... if the accounting says that it may come back


@dataclass(frozen=True)
class Row:
    """How one job stands; `state` is PENDING, RUNNING, COMPLETED, FAILED, or what else SLURM calls it."""

    number: int
    name: str
    id: str
    state: str
    node: str = ""
    attempt: int = 0
    progress: str = ""
    error: str = ""
    traceback: str = ""
    log: Path | None = None

    @property
    def active(self) -> bool:
        """Whether there is more to come."""
        return self.state in ACTIVE

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return not self.active and self.state != "COMPLETED"


class Watcher:
    """Looks at a sweep time and again; it takes a job for ended only if that is still so a while later."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.names = names_of(sweep)
        self.gone: dict[int, float] = {}  # when a job was first not seen any more

    def look(self) -> list[Row]:
        """How all jobs stand.

        Raises:
            ConnectionError: if SLURM does not answer.
        """
        ids, places = self.sweep.ids(), self.sweep.jobs()
        states = {number: State.load(place) for number, place in places.items()}
        under_slurm = self.sweep.manifest()["launcher"] == "slurm"
        seen = self._slurm(ids, states) if under_slurm else self._local(ids, states, places)
        rows = []
        for number, place in sorted(places.items()):
            row = Row(number, self.names[number], ids.get(number, ""), "NEVER STARTED")
            if number in ids:
                folder = self.sweep.directory / "slurm"
                log = slurm.log_of(folder, ids[number]) if under_slurm else place / "log.txt"
                row = _row(replace(row, log=log), states[number], seen[number])
            rows.append(replace(row, progress=progress(place / "record") if row.state == "RUNNING" else ""))
        return rows

    def _local(
        self, ids: Mapping[int, str], states: Mapping[int, State | None], places: Mapping[int, Path]
    ) -> dict[int, slurm.Seen]:
        supervised = supervisor.supervised(self.sweep)
        found = {}
        for number, id in ids.items():
            state = states[number]
            if state is None or state.id != id:
                there, nobody = slurm.Seen("PENDING"), "nobody is there to start it"
                found[number] = there if supervised else slurm.Seen("CANCELLED", "", nobody)
            elif state.state == "INTERRUPTED" and supervised:
                found[number] = slurm.Seen("PENDING")
            elif state.state == "KILLED" and supervised and (places[number] / supervisor.CANCEL).exists():
                found[number] = slurm.Seen("RUNNING", state.node)  # until it is noted why
            elif state.state not in ("RUNNING", "INTERRUPTED"):
                found[number] = slurm.Seen(state.state, state.node)
            elif state.alive() or supervised:  # who notes within a moment how a process has ended
                found[number] = slurm.Seen("RUNNING", state.node)
            else:
                found[number] = slurm.Seen("KILLED", state.node, "its process is gone")
        return found

    def _slurm(self, ids: Mapping[int, str], states: Mapping[int, State | None]) -> dict[int, slurm.Seen]:
        queued = slurm.queued(list(ids.values()))
        left = {number: id for number, id in ids.items() if id not in queued}
        accounted = slurm.accounted(list(left.values()))
        found, now = {}, time.monotonic()
        for number, id in ids.items():
            if number not in left:
                self.gone.pop(number, None)
                seen = queued[id]
                running = seen.state in ("RUNNING", "COMPLETING")
                found[number] = seen._replace(state="RUNNING" if running else "PENDING")
                continue
            seen = accounted.get(id, slurm.Seen(""))
            state = states[number]
            own = state if state is not None and state.id == id else None
            if now - self.gone.setdefault(number, now) < _patience(own, seen):
                found[number] = slurm.Seen("RUNNING", seen.node)
            elif seen.state in ("", "PENDING"):  # part of an array, and taken out of it
                found[number] = slurm.Seen("CANCELLED", "", "it left the queue before it started")
            else:
                found[number] = seen
        return found


def _row(row: Row, state: State | None, seen: slurm.Seen) -> Row:
    """What is seen of a job, with what it says itself of its end."""
    own = state if state is not None and state.id == row.id else None
    attempt = 0 if state is None else state.attempt
    row = replace(row, state=seen.state, node=seen.node, error=seen.reason, attempt=attempt)
    if row.active:
        return replace(row, error="")
    if own is not None and own.state in ("COMPLETED", "FAILED"):
        row = replace(row, state=own.state)
    if own is not None and row.failed:
        row = replace(row, error=own.error or row.error, traceback=own.traceback or "")
    return replace(row, node=seen.node or (own.node if own else ""))


def _patience(own: State | None, seen: slurm.Seen) -> float:
    """How long a job must be out of the queue to have ended: SLURM restarts some that it calls failed."""
    if own is not None and own.state in ("COMPLETED", "FAILED"):
        return 0.0
    return LONGER if own is not None and seen.state in AGAIN else PATIENCE


def names_of(sweep: Sweep) -> dict[int, str]:
    """What tells each job from the others: the overrides that not all of them have."""
    asked = {number: sweep.job(number) for number in sweep.jobs()}
    common = set.intersection(*(set(job["overrides"]) for job in asked.values()))
    return {
        number: " ".join(one for one in job["overrides"] if one not in common) or job["run_name"].split()[0]
        for number, job in asked.items()
    }


def progress(record: Path) -> str:
    """The last step and loss that a run has logged, such as `train step 40, loss 2.31`."""
    path = record / "metrics.jsonl"
    with suppress(OSError, ValueError, KeyError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with suppress(ValueError):
                point = json.loads(line)
                stage, _, name = point["key"].partition("/")
                if name == "loss":
                    return f"{stage} step {point['step']}, loss {point['value']:.3g}"
    return ""


def settled(sweep: Sweep, interval: float = 0.5) -> list[Row]:
    """How all jobs stand, once it is clear of each that left the queue whether it has ended."""
    watcher = Watcher(sweep)
    while True:
        rows = watcher.look()
        if not any(row.active for row in rows if row.number in watcher.gone):
            return rows
        time.sleep(interval)


def counts(rows: Sequence[Row]) -> str:
    """Such as `4 jobs: 1 PENDING, 2 RUNNING, 1 COMPLETED`."""
    states = [row.state for row in rows]
    found = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    return f"{len(rows)} {'job' if len(rows) == 1 else 'jobs'}: {found}"
