"""Locks between processes of this machine; the lease stands in where a file system has no locks."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from app import ROOT

from runners.launcher import ownership
from runners.launcher.ownership import described, held, holder_of

HOLD = """
import os, sys, time
from pathlib import Path
from runners.launcher import ownership
{before}
with ownership.held(Path(sys.argv[1]), 5, lambda: {{"id": "7_0", "attempt": 2}}):
    {within}
    print("held", flush=True)
    time.sleep(60)
"""
NO_LOCKS = """
import errno, fcntl
def flock(file, operation):
    raise OSError(errno.ENOLCK, "no locks available")
fcntl.flock = flock
ownership.BEAT = 0.2
"""


def holder(path: Path, before: str = "", within: str = "pass") -> "subprocess.Popen[str]":
    code = HOLD.format(before=before, within=within)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def ended(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_name_of_the_first_and_gets_the_lock_after_its_death(tmp_path):
    lock = tmp_path / "job.lock"
    assert holder_of(lock) is None
    first = holder(lock)
    words = f"process {first.pid} on {socket.gethostname()} \\(attempt 2 of job 7_0\\)"
    with pytest.raises(BlockingIOError, match=f"{words} holds {lock}"), held(lock, 0.3):
        raise AssertionError("two hold it")
    ended(first)
    assert holder_of(lock) is None
    with held(lock, 1):
        assert json.loads((tmp_path / "job.lock.owner").read_text())["pid"] == os.getpid()
    assert holder_of(lock) is None and described({}) == "another process"


def test_a_worker_that_outlives_a_killed_holder_does_not_hold_the_lock(tmp_path):
    lock = tmp_path / "job.lock"
    worker = "if os.fork() == 0: time.sleep(60); os._exit(0)"
    first = holder(lock, within=worker.replace(": ", ":\n        ", 1).replace("; ", "\n        "))
    first.kill()
    with first:  # not `communicate`: its worker has the other end of the pipe
        first.wait()
    with held(lock, 2):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_file(tmp_path):
    lock = tmp_path / "sweep.lock"
    with held(lock, 1):
        lock.unlink()
        with held(lock, 1):
            assert holder_of(lock) is not None


def test_where_there_are_no_locks_a_lease_is_held_renewed_and_taken_after_its_holders_death(
    tmp_path, monkeypatch
):
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(ownership, "SILENCE", 1.0)
    lock, lease = tmp_path / "job.lock", tmp_path / "job.lock.lease"
    first = holder(lock, NO_LOCKS)
    time.sleep(1.5)  # longer than the silence after which a lease is free
    with pytest.raises(BlockingIOError, match=f"process {first.pid}"), held(lock, 0.3):
        raise AssertionError("two hold it")
    ended(first)
    with held(lock, 1):  # at once: the process is gone from this host
        assert holder_of(lock) is not None
    assert holder_of(lock) is None and not lease.exists()
    lease.write_text(json.dumps({"token": "another", "host": "elsewhere", "pid": 1, "process_start": "1"}))
    assert holder_of(lock) is not None
    with held(lock, 5):  # after the silence
        assert json.loads(lease.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["[]", "3", "torn", "[" * 100_000, '{"pie": 1, "host": "n1"}'])
def test_a_damaged_name_of_the_holder_is_that_of_another_process(content, tmp_path):
    lock = tmp_path / "job.lock"
    with held(lock):
        (tmp_path / "job.lock.owner").write_text(content)
        found = holder_of(lock)
        assert found is not None and described(found) == "another process"
