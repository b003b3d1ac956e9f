"""Jobs on this machine: a process in a session of its own runs them, a few at a time."""

import glob
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
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from runners.disk import write_atomically
from runners.launcher.jobs import GO_ON, State
from runners.launcher.manifest import Sweep
from runners.launcher.snapshot import python_of
from runners.signals import process_start

log = logging.getLogger(__name__)
CANCEL = "cancel"  # a file in a job's directory: it is to end
TICK = 0.1  # seconds
GRACE = 20.0  # seconds that a job has to end after it was told to


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LocalOptions:
    """How the jobs share this machine; names that SLURM knows as well mean the same."""

    array_parallelism: int | None = Field(default=None, ge=1)  # jobs at a time
    gpus_per_node: int | None = Field(default=None, ge=0)  # of each job; None shares out what there is
    timeout_min: float | None = Field(default=None, gt=0)
    max_num_timeout: int = Field(default=3, ge=0)
    signal_delay_s: float = Field(default=120, gt=0)  # between the signal to save and the end

    def limits(self) -> dict[str, Any]:
        """What a job has to know of its time; it is told to save after half of it at the earliest."""
        limit = self.timeout_min
        delay = self.signal_delay_s if limit is None else min(self.signal_delay_s, 30 * limit)
        return {"timeout_min": limit, "max_num_timeout": self.max_num_timeout, "signal_delay_s": delay}

    def parallelism(self, jobs: int) -> int:
        """How many jobs run at a time: as many as there are GPUs, or up to four on processors."""
        wanted = self.array_parallelism or len(gpus()) or min(4, os.cpu_count() or 1)
        if self.gpus_per_node and self.gpus_per_node > len(gpus()):
            raise ValueError(
                f"hydra.launcher.gpus_per_node is {self.gpus_per_node}, and {len(gpus())} GPUs are here"
            )
        if self.gpus_per_node:
            wanted = min(wanted, len(gpus()) // self.gpus_per_node)
        return min(wanted, jobs)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one and one != "-1"]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def start(sweep: Sweep, numbers: Sequence[int], options: LocalOptions, code: Path) -> dict[int, str]:
    """Start a supervisor for the jobs `numbers`; returns the id of each by number."""
    parallelism = options.parallelism(len(numbers))
    ids = {number: f"local.{time.time_ns() // 1_000_000}.{number}" for number in numbers}
    places = sweep.jobs()
    for number in numbers:
        (places[number] / CANCEL).unlink(missing_ok=True)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    # Not OMP_NUM_THREADS of the user's, if given: jobs that share the cores must not each take them all.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // parallelism))
    plan = {
        "ids": ids,
        "parallelism": parallelism,
        "gpus": gpus(),
        "gpus_per_job": options.gpus_per_node,
        "environment": {"OMP_NUM_THREADS": threads},
        "python": python_of(code),
        **options.limits(),
    }
    path = sweep.directory / f"supervisor.{time.time_ns() // 1_000_000}.json"
    write_atomically(path, json.dumps(plan, indent=2) + "\n")
    with (sweep.directory / "supervisor.log").open("a") as said:
        process = subprocess.Popen(
            [*python_of(code), "-m", "runners.launcher.local_main", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # Ctrl-C and a closed terminal do not reach it
        )
    who = {"pid": process.pid, "process_start": process_start(process.pid), "host": socket.gethostname()}
    write_atomically(path, json.dumps(plan | who, indent=2) + "\n")
    return ids


def supervised(sweep: Sweep) -> bool:
    """Whether a supervisor of the sweep is at work on this machine."""
    plans = (json.loads(path.read_text()) for path in sweep.directory.glob("supervisor.*.json"))
    return any(
        plan.get("host") == socket.gethostname() and process_start(plan["pid"]) == plan["process_start"]
        for plan in plans
    )


def cancel(sweep: Sweep, numbers: Sequence[int]) -> None:
    """Have the supervisor end these jobs; where there is none any more, end their processes."""
    places = sweep.jobs()
    alone = not supervised(sweep)
    for number in numbers:
        (places[number] / CANCEL).touch()
        state = State.load(places[number])
        if alone and state is not None and state.state == "RUNNING" and state.alive():
            os.killpg(state.pid, signal.SIGTERM)


@plain_dataclass
class Running:
    """A job's process, and what it has been told."""

    process: subprocess.Popen[bytes]
    slot: int
    began: float
    saving: bool = False
    ending: float | None = None  # when it was told to end
    why: str = ""


class Supervisor:
    """Runs the jobs of one submission, `parallelism` at a time, until all have ended."""

    def __init__(self, sweep: Sweep, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        self.places = sweep.jobs()
        self.pending = deque(int(number) for number in plan["ids"])
        self.running: dict[int, Running] = {}

    def __call__(self) -> None:
        """Run them all."""
        while self.pending or self.running:
            for number in [one for one in self.pending if (self.places[one] / CANCEL).exists()]:
                self.pending.remove(number)
                self._note(number, "CANCELLED", "cancelled before it started")
            for number, job in list(self.running.items()):
                self._watch(number, job)
            while self.pending and len(self.running) < self.plan["parallelism"]:
                self._start(self.pending.popleft())
            time.sleep(TICK)

    def _start(self, number: int) -> None:
        slot = min(set(range(self.plan["parallelism"])) - {job.slot for job in self.running.values()})
        place = self.places[number]
        with (place / "log.txt").open("ab") as said:
            process = subprocess.Popen(
                [*self.plan["python"], "-u", "-m", "runners.launcher.jobs", str(place)],
                env={**os.environ, **self.plan["environment"], **self._gpus(slot), **self._name(number)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.running[number] = Running(process, slot, time.monotonic())

    def _gpus(self, slot: int) -> dict[str, str]:
        """The GPUs of a slot; slots take turns where there are more of them than GPUs."""
        there, each = self.plan["gpus"], self.plan["gpus_per_job"]
        if not there and each is None:
            return {}
        each = 1 if each is None else each
        return {"CUDA_VISIBLE_DEVICES": ",".join(there[(slot * each + i) % len(there)] for i in range(each))}

    def _name(self, number: int) -> dict[str, str]:
        return {"WEIGHTGEOM_JOB": self.plan["ids"][str(number)]}

    def _watch(self, number: int, job: Running) -> None:
        code = job.process.poll()
        if code is not None:
            del self.running[number]
            return self._ended(number, job, code)
        now, limit = time.monotonic(), self.plan["timeout_min"]
        left = None if limit is None else 60 * limit - (now - job.began)
        if job.ending is None and (self.places[number] / CANCEL).exists():
            self._end(job, now, "cancelled")
        elif job.ending is None and left is not None and left <= 0:
            self._end(job, now, f"the time limit of {limit:g} min was reached before its state was saved")
        elif not job.saving and left is not None and left <= self.plan["signal_delay_s"]:
            job.saving = True
            job.process.send_signal(signal.SIGUSR2)
        elif job.ending is not None and now - job.ending > GRACE:
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
        return None

    def _end(self, job: Running, now: float, why: str) -> None:
        job.ending, job.why = now, why
        job.process.terminate()

    def _ended(self, number: int, job: Running, code: int) -> None:
        """Note what the job itself could not; one that was interrupted goes on before the others."""
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)  # workers that it may have left
        state = State.load(self.places[number])
        if job.why == "cancelled":
            self._note(number, "CANCELLED", "cancelled")
        elif job.why:
            self._note(number, "FAILED", job.why)
        elif code == GO_ON:
            self.pending.appendleft(number)
        elif state is None or state.state == "RUNNING" or state.id != self.plan["ids"][str(number)]:
            how = f"killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"
            self._note(number, "KILLED" if code < 0 else "FAILED", how)

    def _note(self, number: int, state: Any, why: str) -> None:
        before = State.load(self.places[number]) or State("RUNNING")
        id = self.plan["ids"][str(number)]
        replace(before, state=state, error=why, id=id).save(self.places[number])
