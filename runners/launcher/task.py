"""One task of an array under SLURM: `python -m runners.launcher.task SWEEP_DIR SUBMISSION`."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from runners.launcher.jobs import CANCEL, GO_ON, Job, State, own_id, requeue
from runners.launcher.manifest import Sweep

TICK = 0.2  # seconds between two looks at a job
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def main(arguments: Sequence[str]) -> None:
    """Run the jobs of this task, unless a later submission has them or this one was withdrawn.

    SLURM may have taken jobs without the launcher hearing of it; of two submissions of a job the last counts.
    """
    sweep, name = Sweep(Path(arguments[0])), arguments[1]
    submissions = sweep.manifest()["submissions"]
    place = next(place for place, known in enumerate(submissions) if known.get("name") == name)
    numbers = submissions[place]["tasks"][int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    started = []
    for number in numbers:
        later = any(number in task for more in submissions[place + 1 :] for task in more["tasks"])
        if later or submissions[place].get("withdrawn"):
            print(f"job {number} does not start: it was {'submitted again' if later else 'cancelled'} since")
        else:
            started.append(sweep.jobs()[number])
    if len(numbers) == 1:
        try:
            for directory in started:
                Job(str(directory), slurm=True)()
        except BlockingIOError as error:
            sys.exit(f"error: {error}")
    else:
        sys.exit(run_in_turn(started, sweep.directory / "slurm" / f"{own_id(slurm=True)}_modules.json"))


def run_in_turn(directories: Sequence[Path], modules: Path) -> int:
    """Run several jobs one after another, each in a fork of this process; returns the exit code.

    The first job writes the names of the `modules` that it has imported; they are imported here for the
    others, which share them. A task that is interrupted is requeued and goes on with the jobs that have not
    ended.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    id, failed = own_id(slurm=True), False
    for directory in directories:
        signal.signal(signal.SIGUSR2, stop)
        if stopped:  # between two jobs
            requeue(json.loads((directory / "job.json").read_text())["limits"]["signal_delay_s"])
            return GO_ON
        before = State.load(directory)
        if before is not None and before.id == id and before.state in ENDED:
            failed = failed or before.state != "COMPLETED"
            continue
        _warm(modules)
        code = _in_fork(directory, modules)
        if code == GO_ON:
            return GO_ON
        if (directory / CANCEL).exists():
            known = State.load(directory) or State("RUNNING")
            replace(known, state="CANCELLED", id=id, error="cancelled", traceback=None).save(directory)
        failed = failed or code != 0
    return int(failed)


def _in_fork(directory: Path, modules: Path) -> int:
    """The exit code of a job in a fork, which is killed where the job is cancelled."""
    if (directory / CANCEL).exists():
        return 1
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            Job(str(directory), slurm=True)()
            code = 0
        except BlockingIOError as error:
            print(f"error: {error}")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                if not modules.exists():
                    modules.write_text(json.dumps(list(sys.modules)))
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if (directory / CANCEL).exists():
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(TICK)


def _warm(modules: Path) -> None:
    """Import the modules that the first job imported; those that fail are skipped."""
    if modules.exists():
        for name in json.loads(modules.read_text()):
            if name not in sys.modules:
                with suppress(Exception):
                    import_module(name)


if __name__ == "__main__":
    main(sys.argv[1:])
