"""Jobs as forks of one process that has imported their libraries."""

import gc
import glob
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from runners.disk import write_atomically
from runners.modules import is_house, is_installed_file
from runners.signals import share_processors

MODULES = "modules.json"  # in a sweep's directory: the libraries that its jobs have imported


def learn(path: Path) -> None:
    """Add the libraries that this process has imported to the list in `path`."""
    known = dict.fromkeys(_listed(path))
    others = [(name, module) for name, module in list(sys.modules.items()) if name not in known]
    if imported := [name for name, module in others if _is_shared(name, module)]:
        write_atomically(path, json.dumps([*known, *imported]))


def _is_shared(name: str, module: object) -> bool:
    """Whether a module may be imported ahead of a job: the user's own may depend on the job."""
    file = getattr(module, "__file__", None)
    return name != "__main__" and (is_house(name) or file is None or is_installed_file(Path(file)))


def _listed(path: Path) -> list[str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def gpus() -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu and gpu != "-1"]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


class Libraries:
    """The libraries listed in `path`, for this process to import once for all jobs.

    Jobs whose `environments` differ share nothing, as an import may read a variable; nor do jobs that see a
    GPU, as a fork cannot use one that an import has begun to use.
    """

    def __init__(self, path: Path, environments: Sequence[Mapping[str, str]]) -> None:
        self.path = path
        self.environment = environments[0] if environments else {}
        self.shared = not gpus() and all(other == self.environment for other in environments)
        self.imported: set[str] = set()

    def known(self) -> bool:
        """Whether a job has listed its libraries, and others may share them."""
        return self.shared and self.path.exists()

    def warm(self, seconds: float = float("inf")) -> bool:
        """Import libraries for about `seconds`; returns whether all are imported. Mutates the environment.

        A library that fails here is left to the jobs.
        """
        os.environ.update(self.environment)
        share_processors()
        end = time.monotonic() + seconds
        for name in _listed(self.path):
            if name in self.imported:
                continue
            if time.monotonic() > end:
                return False
            self.imported.add(name)
            if name not in sys.modules:
                with suppress(Exception):
                    import_module(name)
        gc.freeze()  # so that the forks share this memory, and do not search it for garbage
        return True


class Fork:
    """A fork of this process that runs `work` in a session of its own and ends with the code it returns.

    Its output is appended to `log`. The members are those of `subprocess.Popen`.
    """

    def __init__(self, work: Callable[[], int], log: Path, environment: Mapping[str, str] = {}) -> None:
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, log, environment)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def _become(work: Callable[[], int], log: Path, environment: Mapping[str, str]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(file, number)
        # Those of a fork of a fork replace others, whose end must not close these.
        sys.stdin = open(0, closefd=False)
        sys.stdout, sys.stderr = (open(file, "w", buffering=1, closefd=False) for file in (1, 2))
        os.environ.update(environment)
        code = work()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # not the end of the process that this one is a fork of
