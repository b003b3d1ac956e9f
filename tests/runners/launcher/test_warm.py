"""Imports that jobs share, and forks in the place of processes of their own."""

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import pytest
from sweeps import until

from runners.launcher import warm
from runners.launcher.warm import Fork, Libraries, learn


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "gpus", list)


def test_libraries_are_listed_and_imported_once_and_the_users_own_modules_are_not(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import_module("mine")
    import_module("colorsys")
    path = tmp_path / "modules.json"
    learn(path)
    assert "mine" not in json.loads(path.read_text()) and "runners.disk" in json.loads(path.read_text())
    path.write_text(json.dumps(["colorsys", "no_such_module", "this"]))
    learn(path)
    assert json.loads(path.read_text())[:3] == ["colorsys", "no_such_module", "this"]
    del sys.modules["colorsys"]
    libraries = Libraries(path, [{"GIVEN": "1"}] * 2)
    monkeypatch.setenv("GIVEN", "0")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert libraries.known() and not libraries.warm(-1)
    assert libraries.warm() and "colorsys" in sys.modules and os.environ["GIVEN"] == "1"
    path.write_text("[torn")
    assert Libraries(path, []).warm()


def test_jobs_with_other_variables_or_a_gpu_share_no_imports(tmp_path, monkeypatch):
    (tmp_path / "modules.json").write_text("[]")
    assert not Libraries(tmp_path / "modules.json", [{"A": "1"}, {"A": "2"}]).known()
    monkeypatch.setattr(warm, "gpus", lambda: ["0"])
    assert not Libraries(tmp_path / "modules.json", [{}]).known()


def test_a_fork_has_its_own_session_log_and_variables_and_ends_with_its_code(tmp_path):
    def work() -> int:
        os.write(1, b"from below\n")
        print(os.getsid(0) == os.getpid(), os.environ["OWN"])
        return 7

    fork = Fork(work, tmp_path / "log.txt", {"OWN": "x"})
    assert until(fork.poll, 60) == 7 and fork.poll() == 7
    assert (tmp_path / "log.txt").read_text() == "from below\nTrue x\n" and "OWN" not in os.environ
    fork.terminate()  # it has ended
    paused = Fork(lambda: signal.pause() or 0, tmp_path / "log.txt")
    paused.terminate()
    assert until(paused.poll, 60) == -signal.SIGTERM

    def fail() -> int:
        raise MemoryError

    assert until(Fork(fail, Path(tmp_path / "log.txt")).poll, 60) == 1


def test_a_fork_of_a_fork_keeps_its_output(tmp_path):
    def inner() -> int:
        print("from within")
        return 3

    def outer() -> int:
        return until(Fork(inner, tmp_path / "inner.txt").poll, 60)

    assert until(Fork(outer, tmp_path / "outer.txt").poll, 60) == 3
    assert (tmp_path / "inner.txt").read_text() == "from within\n"
