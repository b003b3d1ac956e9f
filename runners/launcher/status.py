"""Statuses of a sweep's jobs, from the jobs' own state files and from the supervisor or SLURM."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from runners.disk import objects_in
from runners.launcher import local, queue, slurm
from runners.launcher.jobs import LOCK, LOG, TRAINED, State
from runners.launcher.manifest import Sweep
from runners.launcher.ownership import holder_of
from runners.launcher.queue import ReportedState

log = logging.getLogger(__name__)
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED"}
AGAIN = {"RUNNING", "PENDING", "NODE_FAIL", "PREEMPTED", "REQUEUED", "RESIZING", "SUSPENDED", ""}
PATIENCE = 2.0  # seconds out of the queue after which a job counts as ended
LONGER = 15.0  # the same for jobs that SLURM may requeue, by their state in the accounting


@dataclass(frozen=True)
class JobStatus:
    """The status of one job; `state` is PENDING, RUNNING, COMPLETED, FAILED, or another state of SLURM's.

    `waiting` says why a pending job does, and `stuck` why it will never start.
    """

    number: int
    name: str
    id: str
    state: str
    node: str = ""
    attempt: int = 0
    progress: str = ""
    waiting: str = ""
    stuck: str = ""
    error: str = ""
    traceback: str = ""
    log: Path | None = None

    @property
    def active(self) -> bool:
        """Whether the job is pending, running or suspended."""
        return self.state in ACTIVE

    @property
    def failed(self) -> bool:
        """Whether the job ended without completing."""
        return not self.active and self.state != "COMPLETED"

    @property
    def cancelled(self) -> bool:
        """Whether the job was cancelled."""
        return self.state == "CANCELLED"


class StatusPoller:
    """Polls the statuses of a sweep's jobs.

    A job counts as ended only after some seconds out of the queue, because SLURM may requeue it.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.names = job_names(sweep)
        self.missing_since: dict[int, float] = {}  # when a job was first missing from the queue
        self.settling: set[int] = set()  # missing from the queue, and perhaps requeued

    def poll(self) -> list[JobStatus]:
        """The status of every job.

        Raises:
            ConnectionError: if SLURM does not answer.
        """
        ids, directories = current_ids(self.sweep), self.sweep.jobs()
        sharing = Counter(ids.values())
        states = {number: State.load(directory) for number, directory in directories.items()}
        under_slurm = self.sweep.manifest()["launcher"] == "slurm"
        report = self._slurm if under_slurm else self._local
        reported = report(ids, states, directories)
        statuses, folder = [], self.sweep.directory / "slurm"
        for number, directory in sorted(directories.items()):
            job = JobStatus(number, self.names[number], ids.get(number, ""), "NEVER STARTED")
            if number in ids:
                alone = under_slurm and sharing[ids[number]] == 1
                log = slurm.log_path(folder, ids[number]) if alone else directory / LOG
                job = _merged(replace(job, log=log), states[number], reported[number])
            latest = progress(directory / "record") if job.state == "RUNNING" else ""
            statuses.append(replace(job, progress=latest))
        return statuses

    def _local(
        self, ids: Mapping[int, str], states: Mapping[int, State | None], directories: Mapping[int, Path]
    ) -> dict[int, ReportedState]:
        supervised = local.has_supervisor(self.sweep)
        reported = {}
        for number, id in ids.items():
            state = states[number]
            if state is None or state.id != id:
                pending = ReportedState("PENDING")
                orphaned = ReportedState("CANCELLED", "", "no supervisor is left to start it")
                reported[number] = pending if supervised else orphaned
            elif state.state == "INTERRUPTED" and supervised:
                reported[number] = ReportedState("PENDING")
            elif state.state == "KILLED" and supervised and (directories[number] / local.CANCEL).exists():
                # The supervisor will record the cancellation.
                reported[number] = ReportedState("RUNNING", state.node)
            elif state.state not in ("RUNNING", "INTERRUPTED"):
                reported[number] = ReportedState(state.state, state.node)
            elif supervised or _runs(directories[number]):  # a supervisor records an end within a moment
                reported[number] = ReportedState("RUNNING", state.node)
            else:
                reported[number] = ReportedState("KILLED", state.node, "its process is gone")
        return reported

    def _slurm(
        self, ids: Mapping[int, str], states: Mapping[int, State | None], directories: Mapping[int, Path]
    ) -> dict[int, ReportedState]:
        queued = queue.queued(list(ids.values()))
        missing = {number: id for number, id in ids.items() if id not in queued}
        accounted = queue.accounted(list(missing.values()))
        unclear = [id for id in missing.values() if accounted.get(id, NOTHING).state in AGAIN]
        controlled = queue.controlled(unclear) if unclear else {}
        self.settling.clear()
        reported, now, sharing = {}, time.monotonic(), Counter(ids.values())
        for number, id in ids.items():
            if number not in missing:
                self.missing_since.pop(number, None)
                reported[number] = queued[id]
                continue
            last = accounted.get(id, NOTHING)
            if last.state in AGAIN:
                last = controlled.get(id, last)
            state = states[number]
            own = state if state is not None and state.id == id else None
            if now - self.missing_since.setdefault(number, now) < _patience(own, last):
                self.settling.add(number)
                reported[number] = ReportedState("RUNNING", last.node)
            elif own is not None and own.state == "RUNNING" and _runs(directories[number]):
                # Its node was lost to SLURM, but its process lives on.
                reported[number] = ReportedState("RUNNING", own.node)
            elif last.state in ("", "PENDING"):  # cancelled while it waited as part of an array
                reported[number] = ReportedState("CANCELLED", "", "it left the queue before it started")
            else:
                reported[number] = last
        for number in (number for number, id in ids.items() if sharing[id] > 1):
            reported[number] = _of_several(reported[number], states[number], ids[number])
        return reported


NOTHING = ReportedState("")


def current_ids(sweep: Sweep) -> dict[int, str]:
    """The id under which each job runs or waits: of a job in two parts its training's until that is over."""
    directories = sweep.jobs()
    training = sweep.training_ids().items()
    return sweep.ids() | {
        number: id for number, id in training if not (directories[number] / TRAINED).exists()
    }


def _of_several(task: ReportedState, state: State | None, id: str) -> ReportedState:
    """The state of a job whose task, in the state `task`, runs several jobs in turn."""
    own = state if state is not None and state.id == id else None
    if own is not None and own.state in ("COMPLETED", "FAILED", "KILLED", "CANCELLED"):
        return ReportedState(own.state, own.node, own.error or "")
    if own is None and task.state == "RUNNING":
        return ReportedState("PENDING", "", "its task runs the jobs before it")
    if own is None and task.state in ("COMPLETED", "FAILED"):
        return ReportedState("FAILED", task.node, "its task ended before its turn")
    return task


def _runs(directory: Path) -> bool:
    """Whether a process, on any host, holds the job's lock."""
    return holder_of(directory / LOCK) is not None


def _waiting(reported: ReportedState) -> str:
    """Why a job waits, for how long it has waited, and when SLURM expects it to start."""
    now = time.time()
    parts = [reported.reason.replace("None", "")]
    if reported.submitted is not None:
        parts.append(f"for {_duration(now - reported.submitted)}")
    if reported.starts is not None and reported.starts > now:
        parts.append(f"start expected in {_duration(reported.starts - now)}")
    return ", ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    minutes = max(0, round(seconds)) // 60  # a clock may be behind that of SLURM
    days, hours = minutes // 1440, minutes // 60 % 24
    if minutes < 1:
        return f"{max(0, round(seconds))} s"
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _merged(job: JobStatus, state: State | None, reported: ReportedState) -> JobStatus:
    """The reported state of a job, with the end and the error of its own state file."""
    own = state if state is not None and state.id == job.id else None
    attempt = 0 if state is None else state.attempt
    job = replace(job, state=reported.state, node=reported.node, attempt=attempt)
    if job.state == "PENDING":
        stuck = queue.stuck(reported.reason, job.id)
        return replace(job, waiting=_waiting(reported), stuck=stuck)
    if job.active:
        return job
    job = replace(job, error=reported.reason)
    if own is not None and own.state == "TRAINED":
        return replace(job, state="TRAINED", error="its measurements were not submitted")
    if own is not None and own.state in ("COMPLETED", "FAILED"):
        job = replace(job, state=own.state)
    if own is not None and job.failed:
        kept = "" if job.cancelled else own.traceback or ""
        job = replace(job, error=own.error or job.error, traceback=kept)
    return replace(job, node=reported.node or (own.node if own else ""))


def _patience(own: State | None, reported: ReportedState) -> float:
    """Seconds out of the queue after which a job counts as ended; SLURM requeues some failed jobs."""
    if own is not None and own.state in ("COMPLETED", "FAILED"):
        return 0.0
    return LONGER if own is not None and reported.state in AGAIN else PATIENCE


def job_names(sweep: Sweep) -> dict[int, str]:
    """The name of each job: its overrides that are not common to all jobs."""
    jobs = {number: sweep.job(number) for number in sweep.jobs()}
    common = set.intersection(*(set(job["overrides"]) for job in jobs.values()))
    return {
        number: " ".join(override for override in job["overrides"] if override not in common)
        or job["run_name"].split()[0]
        for number, job in jobs.items()
    }


def progress(record: Path) -> str:
    """The last logged step and loss of a run, such as `train step 40, loss 2.31`."""
    path = record / "metrics.jsonl"
    with suppress(OSError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().splitlines()
        for point in objects_in(reversed(lines)):
            with suppress(ValueError, TypeError, KeyError):
                stage, _, name = str(point["key"]).partition("/")
                if name == "loss":
                    return f"{stage} step {point['step']}, loss {point['value']:.3g}"
    return ""


def settled_statuses(sweep: Sweep, interval: float = 0.5) -> list[JobStatus]:
    """The status of every job, once no job that left the queue can still come back to it."""
    poller = StatusPoller(sweep)
    while True:
        statuses = poller.poll()
        if not poller.settling:
            return statuses
        time.sleep(interval)


def counts(statuses: Sequence[JobStatus]) -> str:
    """The number of jobs in each state, such as `4 jobs: 1 COMPLETED, 1 PENDING, 2 RUNNING`."""
    states = [job.state for job in statuses]
    by_state = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    return f"{len(statuses)} {'job' if len(statuses) == 1 else 'jobs'}: {by_state}"
