"""A process that has imported the libraries, of which every run is a fork; none of our own modules is in it.

As a script it reads runs from its standard input, a line of JSON each, and answers with their exit codes.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

LIBRARIES = (
    "mlflow.store.tracking.sqlalchemy_store",
    "matplotlib.figure",
    "pandas",
    "peft",
    "scipy.stats",
    "torch",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "trl.trainer.dpo_trainer",
)


class Warm:
    """The process, started with an environment whose variables the imports may have read."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from warm import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": str(Path(__file__).parent)},
        )
        atexit.register(self.process.kill)

    def run(
        self, directory: Path, script: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[int, str, str]:
        """Exit code, output and errors of a script."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with TemporaryDirectory() as folder:
            files = [f"{folder}/out", f"{folder}/err"]
            asked = [str(directory), [str(script), *arguments], dict(environment), files]
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            out, err = (Path(file).read_text() for file in files)
        return code, out, err


@cache
def warm() -> Warm:
    """The one process of this test worker, which reads no model or data from the hub."""
    return Warm({**os.environ, "HF_HUB_OFFLINE": "1"})


def serve() -> None:
    """Answer runs until the standard input ends."""
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # no fork looks through the libraries for garbage
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    while line := sys.stdin.readline():
        if (child := os.fork()) == 0:
            answers.close()
            return become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def become(directory: str, command: list[str], environment: dict[str, str], files: list[str]) -> None:
    """Run the script in this process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
    sys.argv = command
    own = [str(Path(command[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    helpers = {"", str(Path(__file__).parent)}
    sys.path[:] = [*own, *(place for place in sys.path if place not in helpers)]
    del sys.modules["warm"]
    runpy.run_path(command[0], run_name="__main__")
