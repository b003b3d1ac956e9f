"""The tasks of a job under SLURM that has several: the first runs it, the others take part in its trainings.

Each task holds one process of a training (`weightgeom.training.tasks`). The first writes where the others
find it to a file in the job's directory, which they look for.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runners.disk import write_atomically
from runners.signals import share_processors
from weightgeom.training.tasks import LOCAL, PATIENCE, Door, Task, attend, gathered

DOOR = "tasks.json"  # in a job's directory: the address of the first task of an attempt, and the key to it
PAUSE = 0.2  # seconds between two looks for it


def own_task() -> Task | None:
    """The place of this process in its job, None if that has a single task."""
    if int(os.environ.get("SLURM_NTASKS", 1)) == 1:
        return None
    from submitit.helpers import TorchDistributedEnvironment

    place = TorchDistributedEnvironment()
    ranks = place.rank, place.world_size, place.local_rank, place.local_world_size
    threads = os.environ.get("SLURM_CPUS_PER_TASK")
    node = os.environ["SLURMD_NODENAME"]
    return Task(*ranks, node, None if threads is None else int(threads))


@contextmanager
def first_of(task: Task, directory: Path) -> Iterator[None]:
    """Within it, the other tasks of the job in `directory` take part in this first one's trainings."""
    # submitit's master address is a node's name in SLURM, and its port a number drawn by the job's id: of
    # this host's own name and of a port that is free, the first need not be known and the second be taken.
    address = LOCAL if task.local_number == task.number else socket.gethostname()
    with gathered(task, address) as door:
        known = {"attempt": _attempt(), "address": door.address, "port": door.port, "key": door.key.hex()}
        write_atomically(directory / DOOR, json.dumps(known) + "\n", mode=0o600)
        yield


def another_of(task: Task, directory: Path) -> int:
    """Take part in the trainings of the first task until it ends; returns the exit code.

    Signals, which SLURM sends to all tasks, are the first one's to act on: this one ignores them.
    """
    asked = json.loads((directory / "job.json").read_text())
    os.chdir(asked["cwd"])
    os.environ.update(asked["environment"])
    share_processors()
    print(f"{task} of {task.number}: one process of each training; the run's log is that of task 0")
    end = time.monotonic() + PATIENCE
    while (known := _read(directory / DOOR)).get("attempt") != _attempt():
        if time.monotonic() > end:
            print(f"error: task 0 did not start within {PATIENCE:.0f} s: see its log", file=sys.stderr)
            return 1
        time.sleep(PAUSE)
    attend(Door(known["address"], known["port"], bytes.fromhex(known["key"])), task)
    return 0


def _attempt() -> str:
    """This attempt of the job, among those after a requeue."""
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
