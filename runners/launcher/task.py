"""One task of an array under SLURM, which may be several of a job step, or the job that ends a sweep.

The command is `python -m runners.launcher.task SWEEP_DIR SUBMISSION`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runners.launcher.jobs import CANCEL, GO_ON, LOG, Job, State, exit_code, own_id, requeue
from runners.launcher.manifest import Sweep
from runners.launcher.ranks import another_of, first_of, own_task
from runners.launcher.warm import MODULES, Fork, Libraries

TICK = 0.2  # seconds between two looks at a job
ENDED = ("COMPLETED", "FAILED", "KILLED", "CANCELLED")


def main(arguments: Sequence[str]) -> None:
    """Run the jobs of this task, unless a later submission has them or this one was withdrawn.

    SLURM may have taken jobs without the launcher knowing; of two submissions of a job the last counts.
    """
    sweep, name = Sweep(Path(arguments[0])), arguments[1]
    submissions = sweep.manifest()["submissions"]
    if all(known.get("name") != name for known in submissions):  # the job that ends the sweep
        from runners.launcher.__main__ import main as command

        sys.exit(command(["status", str(sweep.directory)]))
    place = next(place for place, known in enumerate(submissions) if known.get("name") == name)
    part = submissions[place].get("part")
    others = [more for more in submissions[place + 1 :] if part != "training" or more.get("part") == part]
    numbers = submissions[place]["tasks"][int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    started = []
    for number in numbers:
        later = any(number in task for more in others for task in more["tasks"])
        if later or submissions[place].get("withdrawn"):
            print(f"job {number} does not start: it was {'submitted again' if later else 'cancelled'} since")
        else:
            started.append(sweep.jobs()[number])
    code, own = 0, own_task()
    if len(numbers) > 1:
        code = run_in_turn(started, sweep.directory / MODULES)
    elif started and own is not None and own.rank:
        code = another_of(own, started[0])
    elif started:
        with nullcontext() if own is None else first_of(own, started[0]):
            code = exit_code(Job(str(started[0]), slurm=True, part=part))
    if code:
        sys.exit(code)


def run_in_turn(directories: Sequence[Path], modules: Path) -> int:
    """Run several jobs one after another, each in a fork of this process; returns the exit code.

    They share the libraries that the jobs before have listed in `modules`. A task that is interrupted is
    requeued and goes on with the jobs that have not ended.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGUSR2, stop)
    id, failed = own_id(slurm=True), False
    descriptions = {directory: json.loads((directory / "job.json").read_text()) for directory in directories}
    libraries = Libraries(modules, [described["environment"] for described in descriptions.values()])
    for directory in directories:
        before = State.load(directory)
        if before is not None and before.id == id and before.state in ENDED:
            failed = failed or before.state != "COMPLETED"
            continue
        if (directory / CANCEL).exists():
            _save(directory, id, "CANCELLED", "cancelled")
            failed = True
            continue
        if libraries.known():
            libraries.warm()
        if stopped:  # between two jobs
            requeue(descriptions[directory]["limits"]["signal_delay_s"])
            return GO_ON
        print(f"runs {directory}: see {directory / LOG}", flush=True)
        job = Fork(partial(exit_code, Job(str(directory), slurm=True), modules), directory / LOG)
        while (code := job.poll()) is None:
            if (directory / CANCEL).exists():
                with suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)
            elif stopped:  # SLURM may have signalled this process alone
                job.send_signal(signal.SIGUSR2)
            time.sleep(TICK)
        if code == GO_ON:
            return GO_ON
        if code != 0 and (directory / CANCEL).exists():
            _save(directory, id, "CANCELLED", "cancelled")
        elif code < 0:
            time.sleep(5 * TICK)  # SLURM kills all processes of a task: then this one comes no further
            _save(directory, id, "KILLED", f"killed by signal {-code}")
        failed = failed or code != 0
    return int(failed)


def _save(directory: Path, id: str, state: Any, error: str) -> None:
    known = State.load(directory) or State("RUNNING")
    replace(known, state=state, id=id, error=error, traceback=None).save(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
