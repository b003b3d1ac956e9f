"""How processes share this machine."""

import subprocess
import sys

from app import ROOT, environment

from runners.signals import share_processors


def test_threads_that_wait_do_not_spin_unless_they_are_told_to(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "x")
    monkeypatch.delenv("GOMP_SPINCOUNT")  # which is undone, whatever the function does
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
    """What a process that is started now is told."""
    command = [sys.executable, "-c", "import os; print(os.environ.get('GOMP_SPINCOUNT', ''))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_run_says_so_before_torch_is_there():
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
