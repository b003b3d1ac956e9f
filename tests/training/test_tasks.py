"""The tasks of a job: who comes in, who waits for whom, and who ends with whom."""

import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest
import torch
from app import ROOT, environment

from weightgeom.interruption import no_request
from weightgeom.training import tasks
from weightgeom.training.processes import check_gpus, run_on_processes
from weightgeom.training.tasks import LOCAL, Door, Task, attend, gathered, tasks_of_this_job

FIRST, OTHER = (Task(rank, 2, rank, 2, "n1") for rank in (0, 1))


def test_a_task_comes_in_with_the_key_alone_and_ends_with_the_first():
    with gathered(FIRST, LOCAL) as door:
        with pytest.raises(AuthenticationError):
            Client((door.address, door.port), authkey=b"another")
        waiting = threading.Thread(target=attend, args=(door, OTHER), daemon=True)
        waiting.start()
        job = tasks_of_this_job()
        assert job is not None and job.by_rank() == [FIRST, OTHER]
    waiting.join(60)
    assert not waiting.is_alive() and tasks_of_this_job() is None


def test_a_task_whose_first_one_is_gone_ends():
    attend(Door(LOCAL, 1, b"any"), OTHER)  # nobody listens at port 1


def test_a_task_that_does_not_come_in_ends_the_training_with_a_sentence(monkeypatch):
    monkeypatch.setattr(tasks, "PATIENCE", 0.2)
    began = time.monotonic()
    with (
        gathered(FIRST, LOCAL),
        pytest.raises(TimeoutError, match=r"task 1 of 2 of this job did not come in"),
    ):
        run_on_processes(print, 2, "cpu", lambda metrics, step: None, no_request, None)
    assert time.monotonic() - began < 60


def test_a_training_on_another_number_of_processes_than_tasks_is_refused():
    with gathered(FIRST, LOCAL), pytest.raises(ValueError, match=r"in each of this job's 2 tasks: set its"):
        run_on_processes(print, 3, "cpu", lambda metrics, step: None, no_request, None)


def test_a_task_has_a_gpu_of_its_own_or_one_of_those_of_its_node(monkeypatch):
    with gathered(Task(0, 8, 0, 4, "n1"), LOCAL):
        for seen in (1, 4, 8):
            monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
            check_gpus(8)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ValueError, match=r"4 tasks on a node take 4 GPUs.* set hydra.launcher.gpus_per"):
            check_gpus(8)


def test_the_first_process_that_is_started_blocks_all_signals_that_are_its_parents_to_handle():
    script = (
        "from weightgeom.training.worker import SIGNALS, Place, started\n"
        "worker = started(Place(0, 1, 0, 1, '127.0.0.1', 1, 'cpu', 1, 30, None), b'')\n"
        "lines = open(f'/proc/{worker.process.pid}/status').read().splitlines()\n"
        "(mask,) = [int(line.split()[1], 16) for line in lines if line.startswith('SigBlk')]\n"
        "worker.process.kill()\n"
        "print([signal.name for signal in SIGNALS if not mask >> signal - 1 & 1])\n"
    )
    variables = environment({"PYTHONPATH": str(ROOT)})
    ended = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended.stdout + ended.stderr
