"""Jobs on this machine: a supervisor process in its own session runs them, a few at a time."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from runners.disk import read_object, write_atomically
from runners.launcher.jobs import CANCEL, GO_ON, LOCK, LOG, Job, State, exit_code
from runners.launcher.manifest import Sweep
from runners.launcher.ownership import holder_of
from runners.launcher.snapshot import python_of
from runners.launcher.warm import MODULES, Fork, Libraries, gpus
from runners.signals import process_start

log = logging.getLogger(__name__)
TICK = 0.1  # seconds between two rounds of the supervisor
GRACE = 20.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LocalOptions:
    """Options of the local launcher; those that SLURM also has mean the same."""

    array_parallelism: int | None = Field(default=None, ge=1)  # jobs at a time
    gpus_per_node: int | None = Field(default=None, ge=0)  # for each job; None distributes all GPUs
    timeout_min: float | None = Field(default=None, gt=0)
    max_num_timeout: int = Field(default=3, ge=0)
    signal_delay_s: float = Field(default=120, gt=0)  # between the signal to save and the end

    def limits(self) -> dict[str, Any]:
        """The time limits of a job; its signal to save comes after half of `timeout_min` at the earliest."""
        limit = self.timeout_min
        delay = self.signal_delay_s if limit is None else min(self.signal_delay_s, 30 * limit)
        return {"timeout_min": limit, "max_num_timeout": self.max_num_timeout, "signal_delay_s": delay}

    def parallelism(self, jobs: int) -> int:
        """The number of jobs at a time: by default one for each GPU, or up to four on a CPU.

        Raises:
            ValueError: if a job needs more GPUs than this machine has.
        """
        parallel = self.array_parallelism or len(gpus()) or min(4, os.cpu_count() or 1)
        if self.gpus_per_node and self.gpus_per_node > len(gpus()):
            raise ValueError(
                f"hydra.launcher.gpus_per_node is {self.gpus_per_node}, but this machine has {len(gpus())}"
                f" GPUs: set hydra.launcher.gpus_per_node={len(gpus())} or less"
            )
        if self.gpus_per_node:
            parallel = min(parallel, len(gpus()) // self.gpus_per_node)
        return min(parallel, jobs)


def new_ids(numbers: Sequence[int]) -> dict[int, str]:
    """Ids of jobs by number, for one submission."""
    moment = time.time_ns() // 1_000_000
    return {number: f"local.{moment}.{number}" for number in numbers}


def start_supervisor(sweep: Sweep, ids: Mapping[int, str], options: LocalOptions, code: Path) -> None:
    """Start a supervisor for the jobs in `ids`."""
    parallelism = options.parallelism(len(ids))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    # Jobs share the cores; an OMP_NUM_THREADS of the user's takes precedence.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // parallelism))
    plan = {
        "ids": dict(ids),
        "parallelism": parallelism,
        "gpus": gpus(),
        "gpus_per_job": options.gpus_per_node,
        "environment": {"OMP_NUM_THREADS": threads},
        "python": python_of(code),
        **options.limits(),
    }
    path = sweep.directory / f"supervisor.{time.time_ns() // 1_000_000}.json"
    write_atomically(path, json.dumps(plan, indent=2) + "\n")
    with (sweep.directory / "supervisor.log").open("a") as log_file:
        process = subprocess.Popen(
            [*python_of(code), "-m", "runners.launcher.local_main", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,  # out of reach of Ctrl-C and of a closed terminal
        )
    identity = {"pid": process.pid, "process_start": process_start(process.pid), "host": socket.gethostname()}
    write_atomically(path, json.dumps(plan | identity, indent=2) + "\n")


def lock_of(plan: Path) -> Path:
    """The lock that the supervisor of a plan holds, on whatever host."""
    return plan.with_suffix(".lock")


def has_supervisor(sweep: Sweep) -> bool:
    """Whether a supervisor of the sweep runs, here or on another host."""
    return any(map(_supervised, sweep.directory.glob("supervisor.*.json")))


def _supervised(path: Path) -> bool:
    plan: dict[str, Any] = {}
    with suppress(ValueError):  # a damaged one says nothing; its lock does
        plan = read_object(path, "")
    pid = plan.get("pid")
    if plan.get("host") == socket.gethostname() and isinstance(pid, int):
        start = process_start(pid)
        return start is not None and start == plan.get("process_start")  # also before it holds the lock
    return holder_of(lock_of(path)) is not None


def request_cancel(sweep: Sweep, numbers: Sequence[int]) -> None:
    """Ask the supervisor to end these jobs; without a supervisor, send SIGTERM to their processes."""
    directories = sweep.jobs()
    orphaned = not has_supervisor(sweep)
    for number in numbers:
        (directories[number] / CANCEL).touch()
        state = State.load(directories[number])
        if orphaned and state is not None and state.state == "RUNNING" and state.alive():
            os.killpg(state.pid, signal.SIGTERM)


@plain_dataclass
class RunningJob:
    """A job's process, and the signals sent to it."""

    process: subprocess.Popen[bytes] | Fork
    slot: int
    began: float  # monotonic, in seconds
    saving: bool = False  # USR2 was sent
    ending: float | None = None  # the time of SIGTERM
    reason: str = ""  # for SIGTERM


class Supervisor:
    """Runs the jobs of one submission, `parallelism` at a time, until all have ended.

    Jobs that start after another has ended are forks of this process, which has imported the libraries.
    """

    def __init__(self, sweep: Sweep, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        self.directories = sweep.jobs()
        self.pending = deque(int(number) for number in plan["ids"])
        self.running: dict[int, RunningJob] = {}
        self.modules = sweep.directory / MODULES
        jobs = [sweep.job(number)["environment"] for number in self.pending]
        self.libraries = Libraries(self.modules, [{**self.plan["environment"], **job} for job in jobs])

    def __call__(self) -> None:
        """Run all jobs; mutates the environment."""
        while self.pending or self.running:
            for number in list(self.pending):
                if (self.directories[number] / CANCEL).exists():
                    self.pending.remove(number)
                    self._save_state(number, "CANCELLED", "cancelled before it started")
            for number, job in list(self.running.items()):
                self._watch(number, job)
            if self.pending and len(self.running) < self.plan["parallelism"] and self._is_ready():
                self._start(self.pending.popleft())
            else:
                time.sleep(TICK)

    def _is_ready(self) -> bool:
        """Whether this process has imported the libraries; each call imports some. True for a few jobs."""
        few = len(self.pending) < 3  # for which it takes longer than it saves
        return (
            (few and not self.libraries.imported) or not self.libraries.known() or self.libraries.warm(TICK)
        )

    def _start(self, number: int) -> None:
        slot = min(set(range(self.plan["parallelism"])) - {job.slot for job in self.running.values()})
        directory = self.directories[number]
        own = {**self._gpus(slot), "WEIGHTGEOM_JOB": self.plan["ids"][str(number)]}
        began = time.monotonic()
        if self.libraries.imported:
            job = partial(exit_code, Job(str(directory), slurm=False, began=began), self.modules)
            process = Fork(job, directory / LOG, own)
        else:
            process = self._cold(directory, own)
        self.running[number] = RunningJob(process, slot, began)

    def _cold(self, directory: Path, own: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """A job in a process that imports the libraries itself, with `own` variables."""
        with (directory / LOG).open("ab") as log_file:
            return subprocess.Popen(
                [*self.plan["python"], "-um", "runners.launcher.jobs", str(directory), str(self.modules)],
                env={**os.environ, **self.plan["environment"], **own},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
            )

    def _gpus(self, slot: int) -> dict[str, str]:
        """The environment variable with the GPUs of a slot; with more slots than GPUs, slots share them."""
        available, each = self.plan["gpus"], self.plan["gpus_per_job"]
        if not available and each is None:
            return {}
        each = 1 if each is None else each
        chosen = (available[(slot * each + index) % len(available)] for index in range(each))
        return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}

    def _watch(self, number: int, job: RunningJob) -> None:
        """Record a job that has ended; signal one that is cancelled or near its time limit."""
        code = job.process.poll()
        if code is not None:
            del self.running[number]
            return self._ended(number, job, code)
        now, limit = time.monotonic(), self.plan["timeout_min"]
        left = None if limit is None else 60 * limit - (now - job.began)
        if job.ending is None and (self.directories[number] / CANCEL).exists():
            self._terminate(job, now, "cancelled")
        elif job.ending is None and left is not None and left <= 0:
            reason = f"the time limit of {limit:g} min was reached before its state was saved"
            self._terminate(job, now, reason)
        elif not job.saving and left is not None and left <= self.plan["signal_delay_s"]:
            job.saving = True
            job.process.send_signal(signal.SIGUSR2)
        elif job.ending is not None and now - job.ending > GRACE:
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
        return None

    def _terminate(self, job: RunningJob, now: float, reason: str) -> None:
        job.ending, job.reason = now, reason
        job.process.terminate()

    def _ended(self, number: int, job: RunningJob, code: int) -> None:
        """Save the final state of a job that could not do so itself; an interrupted job resumes next."""
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)  # any workers left behind
        state = State.load(self.directories[number])
        if holder_of(self.directories[number] / LOCK) is not None:
            return  # another process runs the job, and this one has given up waiting for it
        if job.reason == "cancelled":
            self._save_state(number, "CANCELLED", "cancelled")
        elif job.reason:
            self._save_state(number, "FAILED", job.reason)
        elif code == GO_ON:
            self.pending.appendleft(number)
        elif state is None or state.state == "RUNNING" or state.id != self.plan["ids"][str(number)]:
            error = f"killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"
            self._save_state(number, "KILLED" if code < 0 else "FAILED", error)

    def _save_state(self, number: int, state: Any, error: str) -> None:
        before = State.load(self.directories[number]) or State("RUNNING")
        id = self.plan["ids"][str(number)]
        kept = None if state == "CANCELLED" else before.traceback
        replace(before, state=state, error=error, traceback=kept, id=id).save(self.directories[number])
