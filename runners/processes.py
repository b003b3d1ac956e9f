"""How processes end, and whether they have: signals, exit codes, who is still alive."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

from weightgeom.interruption import Interrupted

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
    """When process `pid` started (clock ticks since boot): with the pid, its identity.

    None if it is gone. Without /proc only the pid is known.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    try:
        # The second field, the name in parentheses, may hold spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
