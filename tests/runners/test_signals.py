"""Sharing of this machine's cores between processes."""

import subprocess
import sys

from app import ROOT, environment

from runners.signals import share_processors


def test_waiting_threads_do_not_spin_unless_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "x")
    monkeypatch.delenv("GOMP_SPINCOUNT")  # set first, so that monkeypatch restores it whatever happens
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    share_processors()
    assert spins() == ""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    share_processors()
    assert spins() == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    share_processors()
    assert spins() == "7"


def spins() -> str:
    """The spin count in the environment of a new process."""
    command = [sys.executable, "-c", "import os; print(os.environ.get('GOMP_SPINCOUNT', ''))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_run_py_does_not_import_torch_before_main_is_called():
    code = "import runpy, sys; runpy.run_path('run.py'); print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment({}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == "False"
