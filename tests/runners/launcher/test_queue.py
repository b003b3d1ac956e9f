"""SLURM's answers, with stand-ins for its commands; tests/slurm uses a real SLURM."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runners.launcher.jobs import State
from runners.launcher.manifest import Sweep
from runners.launcher.queue import (
    Allocation,
    accounted,
    allocations,
    controlled,
    expanded,
    named,
    queued,
    stuck,
    undisturbed,
)
from runners.launcher.status import StatusPoller
from runners.launcher.usage import usage

Answers = Callable[..., None]


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Makes a command of SLURM's print a text."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def answer(command: str, text: str, code: int = 0) -> None:
        (folder / command).write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        (folder / command).chmod(0o755)

    for command in ("squeue", "sacct", "scontrol"):
        answer(command, "")
    return answer


def test_the_short_form_of_array_ids_is_expanded():
    assert expanded("7") == ["7"] and expanded("7_3") == ["7_3"]
    assert expanded("7_[0-2,5%2]") == ["7_0", "7_1", "7_2", "7_5"]


def test_states_are_read_from_slurms_commands_and_a_failing_queue_raises(answers):
    answers("squeue", "7_0|COMPLETING|n1|5|4|None\\n7_1|REQUEUED||N/A|4|Resources\\n7_3|SUSPENDED|n1|5|4|\\n")
    states = queued(["7_0", "7_1", "7_2", "7_3"])
    assert {id: reported.state for id, reported in states.items()} == {
        "7_0": "RUNNING",
        "7_1": "PENDING",
        "7_3": "SUSPENDED",
    }
    assert states["7_1"][2:] == ("Resources", None, 4.0)
    answers("sacct", "7_2|CANCELLED by 0|None assigned\\n7_[3-4]|PENDING|\\n")
    assert accounted(["7_2", "7_4"])["7_2"][:2] == ("CANCELLED", "")
    assert accounted(["7_4"])["7_4"].state == "PENDING"
    answers("sacct", "", 1)
    answers("scontrol", "JobId=8 ArrayJobId=7 ArrayTaskId=2 JobState=FAILED NodeList=n3\\n")
    assert accounted(["7_2"])["7_2"][:2] == controlled(["7_2"])["7_2"][:2] == ("FAILED", "n3")
    answers("squeue", "", 1)
    with pytest.raises(ConnectionError, match="SLURM does not answer: squeue says"):
        queued(["7_0"])


def test_arrays_are_found_by_name_in_queue_and_accounting_also_where_there_is_no_accounting(answers):
    answers("squeue", "7|one-1\\n7|one-1\\n")
    answers("sacct", "8_0|two-2\\n8_1|two-2\\n9|other\\n")
    assert named(["one-1", "two-2", "three-3"], "2026-01-01") == {"one-1": "7", "two-2": "8"}
    answers("sacct", "", 1)
    assert named(["one-1", "two-2"], "2026-01-01") == {"one-1": "7"}


def test_hours_and_memory_are_those_of_all_attempts_in_the_accounting(answers):
    first = "7_0|REQUEUED|3600|\\n7_0.batch|CANCELLED|3600|10K\\n7_0.0|CANCELLED|3600|3G\\n"
    answers("sacct", f"{first}7_0|CANCELLED by 0|1800|\\n7_0.0|COMPLETED|1800|512M\\n")
    assert allocations(["7_0"]) == [
        Allocation("7_0", "REQUEUED", 3600, 3 * 2**30),
        Allocation("7_0", "CANCELLED", 1800, 512 * 2**20),
    ]
    assert allocations([]) is None
    answers("sacct", "", 1)
    assert allocations(["7_0"]) is None


def test_hours_are_lost_in_attempts_that_end_without_saving(sweep, answers, monkeypatch):
    directory, moments = sweep.jobs()[0], iter([0, 3600, 3700, 5500, 7300])
    monkeypatch.setattr("runners.launcher.jobs.time.time", lambda: next(moments))

    def event(state: str, attempt: int, restarts: int) -> None:
        State(state, attempt, id="7_0").save(directory, restarts=restarts)  # pyright: ignore

    event("RUNNING", 1, 0)
    event("INTERRUPTED", 1, 0)
    event("RUNNING", 2, 1)  # its node is lost, and the one after that dies before the job has begun
    event("RUNNING", 3, 3)
    event("COMPLETED", 3, 3)
    rows = [("REQUEUED", 3600), ("NODE_FAIL", 1200), ("REQUEUED", 600), ("COMPLETED", 1800)]
    answers("sacct", "".join(f"7_0|{state}|{seconds}|\\n" for state, seconds in rows))
    used = usage(sweep)
    assert used is not None and (used.hours, used.lost_hours) == (2.0, 0.5)
    assert used.tags()["slurm_lost_hours"] == "0.50"


def test_in_a_task_of_several_jobs_those_that_ended_well_lose_nothing(sweep, answers, monkeypatch):
    other, moments = sweep.directory / "1", iter([0, 900, 1000])
    monkeypatch.setattr("runners.launcher.jobs.time.time", lambda: next(moments))
    sweep.add_job(1, {"directory": str(other)})
    sweep.list_jobs({1: str(other)})
    State("RUNNING", 1, id="7_0").save(sweep.jobs()[0], restarts=0)
    State("COMPLETED", 1, id="7_0").save(sweep.jobs()[0])
    State("RUNNING", 1, id="7_0").save(other, restarts=0)
    answers("sacct", "7_0|TIMEOUT|3600|\\n")
    used = usage(sweep)
    assert used is not None and used.lost_hours == 0.75  # 3600 s without the 900 s of the first


def test_slurms_commands_do_not_see_the_users_variables_for_them(answers, monkeypatch):
    disturbing = "SQUEUE_STATES SACCT_FORMAT SBATCH_PARTITION SLURM_CLUSTERS SLURM_MEM_PER_CPU SRUN_LABEL"
    for name in disturbing.split():
        monkeypatch.setenv(name, "R")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    seen = undisturbed()
    assert not set(disturbing.split()) & seen.keys()
    assert seen["SLURM_CONF"] == "/etc/slurm.conf" and seen["SLURM_TIME_FORMAT"] == "%s" and "PATH" in seen
    answers("squeue", "7_0|'${SQUEUE_STATES:-PENDING}'||N/A|4|Resources\\n")
    assert queued(["7_0"])["7_0"].state == "PENDING"


def test_reasons_that_do_not_resolve_are_told_with_what_to_do():
    for reason in ("Resources", "Priority", "JobArrayTaskLimit", "Dependency", "None", "BeginTime"):
        assert stuck(reason, "7_0") == ""
    assert stuck("PartitionTimeLimit", "7_0") == (
        "PartitionTimeLimit: timeout_min is beyond the partition's limit"
    )
    assert "`scontrol release 7_0`" in stuck("JobHeldUser", "7_0")
    assert "for one job" in stuck("QOSMaxCpuPerJobLimit", "7")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A sweep of one job, submitted as array 7."""
    sweep = Sweep(tmp_path / "sweep")
    job = {"directory": str(sweep.directory / "0"), "overrides": [], "run_name": "dpo"}
    job |= {"config": {"name": "scratch"}, "limits": {}, "tracking_uri": "sqlite:///mlflow.db"}
    sweep.add_job(0, job)
    sweep.create("slurm", {}, [])
    sweep.list_jobs({0: job["directory"]})
    sweep.add_submission(Path("code"), name="dpo-1", tasks=[[0]])
    sweep.amend_submission(0, ids={"0": "7_0"})
    return sweep


def test_a_job_that_the_queue_hides_is_not_cancelled_while_the_controller_knows_it(sweep, answers):
    answers("sacct", "7_0|PENDING|\\n")
    answers("scontrol", "JobId=7 ArrayJobId=7 ArrayTaskId=0 JobState=RUNNING NodeList=n3\\n")
    poller = StatusPoller(sweep)
    poller.missing_since[0] = time.monotonic() - 60
    assert poller.poll()[0].state == "RUNNING"
    answers("scontrol", "", 1)  # forgotten: it left the queue before it started
    assert poller.poll()[0].state == "CANCELLED"


def test_a_pending_job_shows_why_and_for_how_long_and_a_suspended_one_is_not_pending(sweep, answers):
    now = time.time()
    answers("squeue", f"7_0|PENDING||{now + 7300:.0f}|{now - 600:.0f}|Priority\\n")
    (job,) = StatusPoller(sweep).poll()
    assert job.waiting == "Priority, for 10 min, start expected in 2 h 1 min" and not job.stuck
    answers("squeue", f"7_0|PENDING||N/A|{now + 3600:.0f}|PartitionTimeLimit\\n")  # a clock an hour ahead
    (job,) = StatusPoller(sweep).poll()
    assert job.waiting == "PartitionTimeLimit, for 0 s" and job.stuck.startswith("PartitionTimeLimit: ")
    answers("squeue", f"7_0|SUSPENDED|n1|N/A|{now:.0f}|None\\n")
    (job,) = StatusPoller(sweep).poll()
    assert (job.state, job.active, job.waiting) == ("SUSPENDED", True, "")
