"""A job's files on disk and its signals; the run itself is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from app import ROOT
from sweeps import until

from runners.launcher.jobs import GO_ON, State
from runners.signals import Interruption
from weightgeom.interruption import Interrupted

STAND_IN = """
import os, time
from pathlib import Path
class Run:
    def run(self):
        print("began", time.time(), flush=True)
        {body}
def experiment(description, interruption, trained_on):
    return Run()
"""


def job(folder: Path, body: str, **limits: Any) -> "subprocess.Popen[str]":
    """A job in a process of its own, whose run executes `body`."""
    folder.mkdir(exist_ok=True)
    (folder / "stand_in.py").write_text(STAND_IN.format(body=body))
    replacement = "import sys, stand_in\nsys.modules['runners.compose'] = stand_in\n"
    (folder / "sitecustomize.py").write_text(replacement)
    description = {
        "cwd": str(folder),
        "environment": {},
        "logging": {"version": 1},
        "limits": {"timeout_min": None, "max_num_timeout": 0, "signal_delay_s": 1, **limits},
    }
    (folder / "job.json").write_text(json.dumps(description))
    variables = {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONSAFEPATH": "1", "WEIGHTGEOM_JOB": "local.1"}
    return subprocess.Popen(
        [sys.executable, "-m", "runners.launcher.jobs", str(folder), str(folder / "modules.json")],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_job_adds_less_than_two_seconds_to_its_run(tmp_path):
    start = time.time()
    out, _ = job(tmp_path, "pass").communicate(timeout=60)
    assert float(out.split()[1]) - start < 2 + python_alone()
    assert [event["state"] for event in events(tmp_path)] == ["RUNNING", "COMPLETED"]


def python_alone() -> float:
    start = time.time()
    subprocess.run([sys.executable, "-c", "import filelock, logging.config"], check=True)
    return 4 * (time.time() - start)  # scales the limit with the load of the machine


def test_a_job_that_raises_exits_with_1_and_keeps_the_traceback(tmp_path):
    process = job(tmp_path, "Path('none').read_text()")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "FileNotFoundError" in err
    state = State.load(tmp_path)
    assert state is not None and state.state == "FAILED" and state.attempt == 1
    assert state.error is not None and state.error.startswith("FileNotFoundError: ")
    assert state.traceback is not None and f"{tmp_path}/stand_in.py" in state.traceback
    assert "FileNotFoundError" in (tmp_path / "traceback.txt").read_text()


def test_usr2_outside_a_training_stops_a_job_at_once_with_the_exit_code_of_a_restart(tmp_path):
    process = job(tmp_path, "time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline().startswith("began")
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=20)
    assert process.returncode == GO_ON
    state = State.load(tmp_path)
    assert state is not None and (state.state, state.timeouts) == ("INTERRUPTED", 0)
    again = job(tmp_path, "pass")
    again.communicate(timeout=60)
    assert [event["attempt"] for event in events(tmp_path)] == [1, 1, 2, 2]


def test_usr2_in_a_training_waits_for_the_end_of_the_step_and_forked_workers_block_signals():
    interruption = Interruption(survive=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    interruption.listen()
    try:
        with pytest.raises(Interrupted, match="between two stages"), interruption.stage():
            assert interruption.wanted() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert [interruption.wanted(), interruption.wanted()] == ["save", None]
            os.kill(os.getpid(), signal.SIGUSR2)
            assert [interruption.wanted(), interruption.wanted()] == ["stop", "stop"]
            worker = os.fork()
            if worker == 0:
                os.kill(os.getpid(), signal.SIGUSR2)
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
        with pytest.raises(Interrupted), interruption.stage():
            raise AssertionError("a stage after that does not begin")
        os.kill(os.getpid(), signal.SIGUSR2)  # a second one does not interrupt what follows the first
    finally:
        interruption.end()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_state_is_alive_while_its_process_is(tmp_path):
    process = job(tmp_path, "time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline()
    state = State.load(tmp_path)
    assert state is not None and state.alive()
    process.kill()
    process.communicate()
    until(lambda: not state.alive(), 10)
