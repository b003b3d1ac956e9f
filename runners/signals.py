"""What signals ask of the run in this process: USR2 to save and stop, under SLURM also TERM to save."""

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
    """Hears the signals that a scheduler sends before it takes a job off its node.

    USR2 stops the run: at the end of the step that a training is in, or at once where none is going on.
    With `survive`, TERM makes a training save its state and changes nothing else: a job that exits on the
    TERM of a preemption counts as failed, and only one that is still there is put back into the queue.
    """

    def __init__(self, survive: bool) -> None:
        self.survive = survive
        self._asked: Literal["save", "stop"] | None = None
        self._polled = False
        self._listening = False

    def listen(self) -> None:
        """Take over the signals of this process, the main one; forked workers no longer hear them."""
        self._listening = True
        signal.signal(signal.SIGUSR2, self._stop)
        if self.survive:
            signal.signal(signal.SIGTERM, self._save)
        # A data loader's worker that dies of a signal to the whole job would take the run with it.
        os.register_at_fork(after_in_child=self._deafen)

    def wanted(self) -> Literal["save", "stop"] | None:
        """What was asked for since; a training looks after each of its steps."""
        self._polled = True
        asked = self._asked
        if asked == "save":
            self._asked = None
        return asked

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Around the work of a stage, whose training may look; raises Interrupted if it is to stop."""
        self.check()
        try:
            yield
        finally:
            self._polled = False
        self.check()

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self._asked == "stop":
            raise Interrupted("stopped between two stages")

    def end(self) -> None:
        """Hear nothing any more, and end the workers that are left, deaf as they are."""
        self._listening = False
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        for worker in multiprocessing.active_children():
            worker.kill()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._asked = "stop"
        log.warning("asked to stop (USR2): %s", "after this step" if self._polled else "at once")
        if not self._polled:
            raise Interrupted("stopped outside of a training")

    def _save(self, number: int, frame: FrameType | None) -> None:
        log.warning("asked to end (TERM): a training saves its state, and goes on until it is killed")
        self._asked = self._asked or "save"

    @property
    def _signals(self) -> set[signal.Signals]:
        return {signal.SIGUSR2, signal.SIGTERM} if self.survive else {signal.SIGUSR2}

    def _deafen(self) -> None:
        if self._listening:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)


Status = Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"]


_SIGNAL_CODES = {128 + signal.SIGINT, 128 + signal.SIGTERM}


def share_processors() -> None:
    """Let threads that wait for each other give up their core soon; to be called before torch is imported.

    By default they spin, and where another process needs one of the cores a step of training waits for a
    thread that is not running: on two cores, beside one other process, 2.8 s instead of 0.2 s. A wait policy
    that is in the environment stays. It concerns libgomp, which torch comes with.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def terminations_as_exceptions() -> Iterator[None]:
    """Turn the first SIGTERM into `SystemExit(143)`, so that the run can still note its end.

    Later ones are ignored until the block is left: they would cut that note short. Only the main
    thread can do this; in others the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, terminating = os.getpid(), False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminating
        if os.getpid() != owner:  # a forked worker is no run: it dies as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not terminating:
            terminating = True
            raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def status_after(error: BaseException) -> Status:
    """How a run stands that `error` ended: KILLED by Ctrl-C or SIGTERM, FAILED by anything else.

    One that was interrupted is SCHEDULED: it will go on.
    """
    if isinstance(error, Interrupted):
        return "SCHEDULED"
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return "FINISHED"
    if isinstance(error, SystemExit) and error.code in _SIGNAL_CODES:
        return "KILLED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def process_start(pid: int) -> str | None:
    """When process `pid` started (hundredths of a second since boot): with the pid, its identity.

    None if it is gone. Not the time of day, which would change with the clock.
    """
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return str(round(100 * (process.create_time() - psutil.boot_time())))
    except psutil.NoSuchProcess:
        return None
