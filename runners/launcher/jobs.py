"""One job of a sweep, under SLURM or here, and its files on disk.

`state.json` is the state of the last attempt, `events.jsonl` logs the states of all attempts,
`traceback.txt` is the last error, and `trained.json` holds the device of a training whose measurements are
another job's. The module imports little, because signals that arrive before a job has
installed its handlers are lost.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from runners.disk import is_number, read_object, write_atomically
from runners.errors import replace_unprintable
from runners.launcher.ownership import held
from runners.launcher.queue import undisturbed
from runners.launcher.warm import learn
from runners.signals import Interruption, process_start, share_processors, status_after
from runners.tracking.record import Record
from runners.tracking.redaction import one_line, redacted_text
from weightgeom.interruption import Interrupted

BY_SCRIPT = "WEIGHTGEOM_REQUEUED_BY_SCRIPT"  # set where the script of a job requeues it
GO_ON = 75  # exit code of an interrupted job that has to be restarted (EX_TEMPFAIL)
CANCEL = "cancel"  # the file in a job's directory that requests its end
LOCK = "job.lock"  # in a job's directory, held while the job runs
LOG = "log.txt"  # in a job's directory: its output, unless SLURM has a file for it
TRAINED = "trained.json"
PATIENCE = 60.0  # seconds for which an attempt waits for another one to end
BEGAN = time.monotonic()
STATES = {"FINISHED": "COMPLETED", "FAILED": "FAILED", "KILLED": "KILLED", "SCHEDULED": "INTERRUPTED"}


@dataclass(frozen=True)
class State:
    """The state of a job, written by the job itself: the content of `state.json`."""

    state: Literal["RUNNING", "INTERRUPTED", "TRAINED", "COMPLETED", "FAILED", "KILLED", "CANCELLED"]
    attempt: int = 0
    timeouts: int = 0
    id: str = ""
    began: float = 0.0  # seconds since 1970
    node: str = ""
    pid: int = 0
    process_start: str | None = None
    error: str | None = None
    traceback: str | None = None

    @classmethod
    def load(cls, directory: Path) -> "State | None":
        """The state of the job in `directory`, None before its first attempt."""
        path, advice = directory / "state.json", "delete it, and the job counts as not begun"
        if not path.exists():
            return None
        try:
            state = cls(**read_object(path, advice))
        except TypeError as error:  # other fields
            raise ValueError(f"{path} is damaged ({error}): {advice}") from error
        texts = (state.state, state.id, state.node)
        if not (
            all(isinstance(text, str) for text in texts)
            and all(
                isinstance(text, str | None) for text in (state.process_start, state.error, state.traceback)
            )
            and all(map(is_number, (state.attempt, state.timeouts, state.pid, state.began)))
        ):
            raise ValueError(f"{path} is damaged (a field is of another kind): {advice}")
        return state

    def save(self, directory: Path, **more: Any) -> "State":
        """Write the state, and a line with the state and `more` to the log of events; returns the state."""
        line = {"time": round(time.time(), 3), **asdict(self), **more}
        with (directory / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.keep(directory)
        return self

    def keep(self, directory: Path) -> None:
        """Write the state without an event."""
        write_atomically(directory / "state.json", json.dumps(asdict(self), indent=2) + "\n")

    def alive(self) -> bool:
        """Whether the job's process runs on this host."""
        start = process_start(self.pid)
        return self.node == socket.gethostname() and start is not None and start == self.process_start

    @classmethod
    def begin(cls, directory: Path, id: str, node: str) -> "State":
        """Save the state of a new attempt in this process."""
        before = cls.load(directory)
        attempt, timeouts = (0, 0) if before is None else (before.attempt, before.timeouts)
        if before is not None and before.id != id:
            timeouts = 0  # a new submission counts anew
        pid = os.getpid()
        begun = cls("RUNNING", attempt + 1, timeouts, id, time.time(), node, pid, process_start(pid))
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return begun.save(directory, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), restarts=restarts)

    def superseded(self, directory: Path) -> bool:
        """Whether a later attempt has begun since: on a lost node a process may live on."""
        latest = State.load(directory)
        return latest is not None and (latest.attempt, latest.pid) != (self.attempt, self.pid)


@dataclass(frozen=True)
class Job:
    """One run of a sweep, in a process of its own: the call runs or resumes it.

    `directory` holds its `job.json`; `began` is when its time did, on this process's clock. Of a run in two
    jobs, the `part` `training` ends after the training, and the part `measuring` goes on from there.
    """

    directory: str
    slurm: bool
    began: float = BEGAN
    part: str | None = None

    def __call__(self) -> None:
        """Run the job; an error is saved in its state and raised, so that the exit code shows it.

        The job holds the lock of its directory until it ends.

        Raises:
            BlockingIOError: if another process runs the job and does not end within `PATIENCE` seconds.
        """
        directory = Path(self.directory)
        id = own_id(self.slurm)
        if self.part == "training" and (directory / TRAINED).exists():
            print("nothing to do: an earlier attempt has trained")
            return

        def about() -> dict[str, object]:
            before = State.load(directory)
            return {"id": id, "attempt": 1 if before is None else before.attempt + 1}

        with held(directory / LOCK, PATIENCE, about):
            before = State.load(directory)
            if before is not None and before.state == "COMPLETED":
                print(f"nothing to do: attempt {before.attempt} completed this job")
                replace(before, id=id).keep(directory)
                return
            self._attempt(directory, id)

    def _attempt(self, directory: Path, id: str) -> None:
        asked = json.loads((directory / "job.json").read_text())
        node = os.environ["SLURMD_NODENAME"] if self.slurm else socket.gethostname()
        begun = State.begin(directory, id, node)
        interruption = Interruption(survive=self.slurm)
        interruption.listen()
        try:
            self._run(asked, interruption)
        except Interrupted as pause:
            self._pause(begun, asked, pause)
        except BaseException as error:
            self._fail(begun, error)
            raise
        else:
            spent = round(time.process_time(), 2)
            ended: Any = "TRAINED" if self.part == "training" else "COMPLETED"
            begun = replace(begun, state=ended).save(directory, processor_seconds=spent)
        finally:
            interruption.end()

    def _run(self, asked: dict[str, Any], interruption: Interruption) -> None:
        import logging.config

        os.chdir(asked["cwd"])
        os.environ.update(asked["environment"])
        share_processors()
        logging.config.dictConfig(_in_a_file(asked["logging"]))
        from runners.compose import experiment

        trained = Path(self.directory) / TRAINED
        device = read_object(trained, "delete it to train again")["device"] if trained.exists() else None
        made = experiment(asked, interruption, device)
        if self.part == "training":
            made.train()
            write_atomically(trained, json.dumps({"device": made.device}) + "\n")
        else:
            made.run()

    def _pause(self, begun: State, asked: dict[str, Any], pause: Interrupted) -> None:
        """Requeue the job, or fail if it has reached its time limit more than `max_num_timeout` times."""
        limits = asked["measuring_limits" if self.part == "measuring" else "limits"]
        timeouts = begun.timeouts + _time_is_up(limits, self.began)
        allowed = limits["max_num_timeout"]
        paused = replace(begun, state="INTERRUPTED", timeouts=timeouts, error=str(pause))
        if timeouts > allowed:
            error = TimeoutError(_out_of_time(limits, str(pause)))
            self._fail(paused, error)
            Record(Path(self.directory) / "record").end("FAILED", one_line(error))
            raise error from pause
        paused.save(Path(self.directory))
        if self.slurm:
            requeue(limits["signal_delay_s"])
        sys.exit(GO_ON)

    def _fail(self, begun: State, error: BaseException) -> None:
        directory = Path(self.directory)
        if begun.superseded(directory):
            return
        (directory / "traceback.txt").write_text(redacted_text(traceback.format_exc()))
        ended: Any = STATES[status_after(error)]
        shown = redacted_text(own_frames(error))
        replace(begun, state=ended, error=one_line(error), traceback=shown).save(directory)


def _in_a_file(settings: dict[str, Any]) -> dict[str, Any]:
    """The same logging without Rich, which pads and wraps every line to the width of a terminal."""
    plain = {"format": "%(asctime)s %(message)s", "datefmt": "%H:%M:%S"}
    handlers = {
        name: {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"}
        if str(handler.get("class", "")).startswith("rich.")
        else handler
        for name, handler in settings.get("handlers", {}).items()
    }
    return {
        **settings,
        "formatters": {**settings.get("formatters", {}), "plain": plain},
        "handlers": handlers,
    }


def _out_of_time(limits: dict[str, Any], pause: str) -> str:
    minutes, allowed = limits["timeout_min"], limits["max_num_timeout"]
    again = f"give it more time with resubmit --timeout_min {2 * minutes:g}"
    saved = f"the state is saved, and resubmit goes on from it; {again}"
    measured = (
        "the checkpoints and trials that are measured are kept, and resubmit goes on behind them; if it ends"
        f" here again, {again}"
    )
    return (
        f"the time limit of {minutes:g} min was reached, and max_num_timeout={allowed} allows no further"
        f" attempt; {saved if 'its state is saved' in pause else measured}"
    )


def own_frames(error: BaseException) -> str:
    """A traceback without the libraries' frames, except the last frame."""
    frames = traceback.extract_tb(error.__traceback__)
    kept = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename]
    if frames and frames[-1] not in kept:
        kept.append(frames[-1])
    lines = traceback.format_list(kept) + traceback.format_exception_only(error)
    return "Traceback (most recent call last):\n" + "".join(lines)


def own_id(slurm: bool) -> str:
    """The id of this job: of SLURM's, one task of an array alone, or of the supervisor's."""
    if not slurm:
        return os.environ["WEIGHTGEOM_JOB"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _time_is_up(limits: dict[str, Any], began: float) -> bool:
    """Whether the signal announced the end of the job's time rather than a preemption.

    By this process's own clock: that of a node and that of SLURM's controller may differ.
    """
    if limits["timeout_min"] is None:
        return False
    early = 60  # seconds by which SLURM may send the signal early
    return time.monotonic() - began >= 60 * limits["timeout_min"] - limits["signal_delay_s"] - early


def requeue(patience: float) -> None:
    """Requeue this job, which stops it, unless SLURM has done so already, as after the loss of its node.

    Retries for `patience` seconds while SLURM does not answer. In a container, which has no commands of
    SLURM's, the script around it does this for a job that ends with `GO_ON`.
    """
    if os.environ.get(BY_SCRIPT):
        return
    end = time.monotonic() + patience
    id = own_id(slurm=True)  # not SLURM_JOB_ID: that of an array's last task is the id of the whole array
    while True:
        restarts = re.search(r"\bRestarts=(\d+)", _scontrol("-o", "show", "job", id).stdout)
        if restarts is not None and int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            return
        asked = _scontrol("requeue", id)
        if asked.returncode == 0:
            return
        if time.monotonic() > end:
            raise ChildProcessError(f"SLURM did not requeue the job: {asked.stderr.strip()}")
        time.sleep(2)


def _scontrol(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, env=undisturbed())


def exit_code(job: Job, modules: Path | None = None) -> int:
    """Run a job in this process; its exit code. An error is printed, with secrets masked.

    The libraries that the job has imported are listed in `modules`.
    """
    replace_unprintable()
    try:
        job()
        return 0
    except BlockingIOError as error:
        print(f"error: {error}", file=sys.stderr)
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        print(end.code, file=sys.stderr)
    except BaseException:
        sys.stderr.write(redacted_text(traceback.format_exc()))
    finally:
        if modules is not None:
            with suppress(OSError):
                learn(modules)
    return 1


def main(arguments: Sequence[str]) -> None:
    """`python -m runners.launcher.jobs DIRECTORY MODULES`: run the job in that directory."""
    sys.exit(exit_code(Job(arguments[0], slurm=False), Path(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
