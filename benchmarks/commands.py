"""Shared by the benchmarks: commands in processes of their own, their records, and digests of tables."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, str(ROOT / "run.py")]
LAUNCHER = [sys.executable, "-m", "runners.launcher"]


def environment() -> dict[str, str]:
    """One thread, no network, and this checkout."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | own


def started(home: Path, command: list[str]) -> subprocess.Popen[str]:
    """The command in a session of its own, which works in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command, cwd=home, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def ended(home: Path, command: list[str]) -> tuple[int, str]:
    """Exit code and output."""
    process = started(home, command)
    out, _ = process.communicate()
    return process.returncode, out


def processes(home: Path) -> Iterator[tuple[int, str]]:
    """Pid and command of those that work in `home`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_text().replace("\0", " ")
            if str(home) in line or os.readlink(path / "cwd") == str(home):
                yield int(path.name), line
        except OSError:
            continue


def tables(record: Path) -> dict[str, str]:
    """Digests of a record's tables."""
    paths = sorted((record / "artifacts/tables").glob("*.csv"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def newest(home: Path) -> Path:
    """The record of the last run."""
    return max(home.glob("outputs/jobs/*/*/record"), key=lambda path: path.parent)
