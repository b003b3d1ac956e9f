"""Sharing of this machine's cores between processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from app import ROOT, environment

from runners.signals import process_start, share_processors


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_start_of_a_process_is_the_one_that_earlier_versions_stored():
    # The 22nd field of stat, in clock ticks since boot, of which Linux has 100 a second.
    stored = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert process_start(os.getpid()) == stored


def test_a_process_that_has_ended_has_no_start():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(process.pid) is None  # not waited for: a zombie
    process.wait()
    assert process_start(process.pid) is None
    for damaged in (None, 0, -1, "7", [7], True, 10**30):
        assert process_start(damaged) is None  # pyright: ignore[reportArgumentType]
