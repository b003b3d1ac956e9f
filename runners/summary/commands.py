"""Commands that a run suggests: the one that started it, and the next one."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.tracking.redaction import redacted_command, redacted_text

SEEDS = "seed=0,1,2"


def again(arguments: Sequence[str] | None = None) -> str:
    """The command that started this process, or the same with other `arguments`, for a shell."""
    program = sys.argv[0]
    start = [_python(), program] if program.endswith(".py") else ["weightgeom", "run"]
    return redacted_command([*start, *(sys.argv[1:] if arguments is None else arguments)])


def over_seeds() -> str:
    """The command of this process as a sweep over three seeds."""
    kept = [argument for argument in sys.argv[1:] if not argument.startswith("seed=")]
    # Next to the other overrides, because Hydra refuses overrides that a flag separates from the others.
    overrides = [place for place, text in enumerate(kept) if "=" in text and not text.startswith("-")]
    place = overrides[0] if overrides else len(kept)
    return again([*kept[:place], SEEDS, *kept[place:], "-m"])


def report(name: str, outputs: Path, tracking_uri: str) -> str:
    """The command that makes the report of an experiment, without its defaults."""
    usual = outputs == Path("outputs").absolute()
    command = ["weightgeom", "report", name, *([] if usual else ["--outputs", str(outputs)])]
    store = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{outputs}/mlflow.db")
    return redacted_command(command if tracking_uri == store else [*command, "--tracking-uri", tracking_uri])


def open_mlflow(tracking_uri: str, experiment_id: str | None) -> list[str]:
    """The address of the experiment's table of runs; of a file, behind the command that starts the server."""
    table = f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    page = "" if experiment_id is None else table
    location = redacted_text(tracking_uri)
    if location.startswith("http"):
        return [location.rstrip("/") + page]
    program = ["mlflow"] if shutil.which("mlflow") else [_python(), "-m", "mlflow"]
    server = ["ui", "--backend-store-uri", location, "--host", "127.0.0.1", "--port", "5000"]
    return [shlex.join([*program, *server]), f"http://127.0.0.1:5000{page}"]


def _python() -> str:
    """This interpreter, as a shell in the working directory would call it."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else sys.executable
