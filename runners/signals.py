"""Signals to the run in this process: USR2 saves and stops it; under SLURM, TERM saves it."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import psutil

from weightgeom.interruption import Interrupted

log = logging.getLogger(__name__)


class Interruption:
    """Handles the signals that a scheduler sends before it takes a job off its node.

    USR2 stops the run: at the end of the training step, or at once outside a training. With `survive`, TERM
    makes a training save its state and continue: SLURM counts a job that exits on the TERM of a preemption
    as failed, and requeues only a job that is still running.
    """

    def __init__(self, survive: bool) -> None:
        self.survive = survive
        self._asked: Literal["save", "stop"] | None = None
        self._polled = False
        self._listening = False

    def listen(self) -> None:
        """Install the handlers in this process; forked workers block the same signals."""
        self._listening = True
        signal.signal(signal.SIGUSR2, self._stop)
        if self.survive:
            signal.signal(signal.SIGTERM, self._save)
        # A signal to the whole job would kill the data loader's workers, and their death the run.
        os.register_at_fork(after_in_child=self._deafen)

    def wanted(self) -> Literal["save", "stop"] | None:
        """The request since the last call; a training calls this after each step."""
        self._polled = True
        asked = self._asked
        if asked == "save":
            self._asked = None
        return asked

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Wraps the work of a stage, whose training may call `wanted`; raises Interrupted on a stop."""
        self.check()
        try:
            yield
        finally:
            self._polled = False
        self.check()

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self._asked == "stop":
            raise Interrupted("stopped between two stages")

    def end(self) -> None:
        """Ignore the signals from now on, and kill the remaining workers, which block them."""
        self._listening = False
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        for worker in multiprocessing.active_children():
            worker.kill()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked == "stop":  # a second one must not interrupt the saving and the requeue
            return
        self._asked = "stop"
        log.warning("stop requested (USR2): %s", "after this step" if self._polled else "at once")
        if not self._polled:
            raise Interrupted("stopped outside a training")

    def _save(self, number: int, frame: FrameType | None) -> None:
        log.warning("termination announced (TERM): a training saves its state and continues until killed")
        self._asked = self._asked or "save"

    @property
    def _signals(self) -> set[signal.Signals]:
        return {signal.SIGUSR2, signal.SIGTERM} if self.survive else {signal.SIGUSR2}

    def _deafen(self) -> None:
        if self._listening:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)


Status = Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"]
# Their default action ends a process at once: a closed terminal, Ctrl-\, a limit of processor time.
_ENDING = (signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
_SIGNAL_CODES = {128 + number for number in (signal.SIGINT, signal.SIGTERM, *_ENDING)}


def share_processors() -> None:
    """Make waiting OpenMP threads yield their core early; call this before torch is imported.

    By default they spin, and with another process on one of the cores every training step waits for a
    thread that is not scheduled: on two cores with one other process, 2.8 s instead of 0.2 s. An
    OMP_WAIT_POLICY in the environment takes precedence. The variable is libgomp's, the OpenMP of torch.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def terminations_as_exceptions(survive: bool = False) -> Iterator[None]:
    """Turn the first signal that ends a process into `SystemExit`, so that the run can still record its end.

    SIGTERM, unless the run should `survive` it, SIGHUP, SIGQUIT and SIGXCPU; the exit code is 128 plus the
    number. Later ones are ignored until the block exits, as they would interrupt the writing of that record.
    Ignored signals stay ignored, as nohup wants it. Only the main thread can handle signals; in others the
    block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, terminating = os.getpid(), False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminating
        if os.getpid() != owner:  # a forked worker dies of the signal as usual
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not terminating:
            terminating = True
            raise SystemExit(128 + number)

    handled = _ENDING if survive else (signal.SIGTERM, *_ENDING)
    wanted = [number for number in handled if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, terminate) for number in wanted}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def status_after(error: BaseException) -> Status:
    """The status of a run that `error` ended: KILLED by Ctrl-C or a signal, FAILED by other errors.

    Interrupted is SCHEDULED: the run will resume. SystemExit(0) is FINISHED.
    """
    if isinstance(error, Interrupted):
        return "SCHEDULED"
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return "FINISHED"
    if isinstance(error, SystemExit) and error.code in _SIGNAL_CODES:
        return "KILLED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def process_start(pid: int) -> str | None:
    """The start of process `pid` in hundredths of a second since boot; with the pid, its identity.

    None if the process is gone, or if `pid` is not a positive integer (it may come from a damaged file). Time
    since boot, unlike the time of day, does not change with the clock.
    """
    if type(pid) is not int or pid < 1:  # psutil takes None for this process
        return None
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return str(round(100 * (process.create_time() - psutil.boot_time())))
    except psutil.NoSuchProcess:
        return None
