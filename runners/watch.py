"""How the jobs of a sweep stand, by their own account and by that of who runs them, until all have ended."""

import json
import logging
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runners import slurm, supervisor
from runners.complaints import complaint
from runners.jobs import State
from runners.manifest import Sweep
from runners.record import Record
from runners.redaction import redacted_text
from runners.sweep import summarise
from runners.sync import publish

log = logging.getLogger(__name__)
ACTIVE = {"PENDING", "RUNNING"}
AGAIN = {"RUNNING", "PENDING", "NODE_FAIL", "PREEMPTED", "REQUEUED", "RESIZING", "SUSPENDED", ""}
REPORT = "report.html"  # of a sweep: the artifact
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


def finish(sweep: Sweep, rows: Sequence[Row]) -> None:
    """End the sweep's record, and those of runs that could not do it, if all jobs have ended; only once."""
    if any(row.active for row in rows):
        return
    with sweep.lock():
        record = Record(sweep.directory / "record")
        if record.status()["status"] != "RUNNING":
            return
        jobs = {row.number: sweep.job(row.number) for row in rows}
        ended = [_ended(row, jobs[row.number]) for row in rows]
        uri = next(iter(jobs.values()))["tracking_uri"]
        summarise(record, [one.directory for one in ended])
        publish([record, *ended], uri)
        if any(job["config"].get("report") for job in jobs.values()):
            _report(record, next(iter(jobs.values())))
        failed = [row for row in rows if row.failed]
        cancelled = all(row.state == "CANCELLED" for row in failed)
        error = f"{len(failed)} of {len(rows)} jobs did not complete" if failed else None
        record.end("FINISHED" if not failed else "KILLED" if cancelled else "FAILED", error)
        publish([record], uri)


def _report(record: Record, job: Mapping[str, Any]) -> None:
    """Make the report on the experiment, of which the sweep's record gets the page; trouble is a warning."""
    from runners.report import make  # noqa: PLC0415 (heavy)

    record.artifact(REPORT).unlink(missing_ok=True)
    try:
        page = make([job["config"]["name"]], job["tracking_uri"], Path(job["outputs"]))
        shutil.copyfile(page, record.artifact(REPORT))
    except Exception as error:  # whatever it is, the runs are done
        log.warning("no report was made: %s", complaint(error))


def report_of(sweep: Sweep) -> tuple[Path | None, str] | None:
    """The page on a sweep that has ended, if it was made, and what makes it; None if none was asked for."""
    from runners.report import directory_of  # noqa: PLC0415 (heavy)

    job = sweep.job(next(iter(sweep.jobs())))
    if not job["config"].get("report"):
        return None
    name, outputs, store = job["config"]["name"], job["outputs"], redacted_text(job["tracking_uri"])
    command = ["python", "-m", "runners.report", name, "--outputs", outputs, "--tracking-uri", store]
    made = (sweep.directory / "record/artifacts" / REPORT).exists()
    return directory_of(Path(outputs), [name]) / "index.html" if made else None, shlex.join(command)


def _ended(row: Row, job: Mapping[str, Any]) -> Record:
    """The record of a run, which now says how it ended, where the run could not do it."""
    record = Record(Path(job["directory"]) / "record")
    if not (record.directory / "run.json").exists():
        Record.create(
            record.directory,
            experiment=job["config"]["name"],
            name=job["run_name"],
            params=job["params"],
            tags=job["config"]["tags"],
            inputs=[],
            tracking_uri=job["tracking_uri"],
            parent=Path(job["parent"]),
        )
    if row.failed and record.status()["status"] in ("SCHEDULED", "RUNNING"):
        status = "KILLED" if row.state in ("CANCELLED", "KILLED") else "FAILED"
        record.end(status, row.error or row.state.lower(), record.last_sign_of_life())
    return record


def counts(rows: Sequence[Row]) -> str:
    """Such as `4 jobs: 1 PENDING, 2 RUNNING, 1 COMPLETED`."""
    states = [row.state for row in rows]
    found = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    return f"{len(rows)} {'job' if len(rows) == 1 else 'jobs'}: {found}"
