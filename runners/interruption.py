"""What signals ask of the run in this process: USR2 to save and stop, under SLURM also TERM to save."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

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
