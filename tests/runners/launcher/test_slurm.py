"""Requests to SLURM and its answers, with stand-ins for its commands; tests/slurm uses a real SLURM."""

import pytest

from runners.launcher.slurm import SlurmOptions, accounted, expanded, queued


def test_the_short_form_of_array_ids_is_expanded():
    assert expanded("7") == ["7"] and expanded("7_3") == ["7_3"]
    assert expanded("7_[0-2,5%2]") == ["7_0", "7_1", "7_2", "7_5"]


def test_options_become_submitits_parameters_with_requeue():
    options = SlurmOptions(mem_gb=1.5, partition="gpu", timeout_min=1, additional_parameters={"hold": True})
    assert options.parameters() == {
        "job_name": "weightgeom",
        "time": 1,
        "mem": "1536MB",
        "partition": "gpu",
        "nodes": 1,
        "array_parallelism": 256,
        "signal_delay_s": 30,  # half of the limit, where the default of 120 s would be all of it
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "hold": True},
    }
    with pytest.raises(ValueError, match="a run is one process"):
        SlurmOptions(tasks_per_node=2)


def test_states_are_read_from_slurms_commands_and_a_failing_queue_raises(tmp_path, monkeypatch):
    def answers(command: str, text: str, code: int = 0) -> None:
        (tmp_path / command).write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        (tmp_path / command).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answers("squeue", "7_0|RUNNING|n1|None\\n7_1|PENDING||Resources\\n")
    assert {id: reported.state for id, reported in queued(["7_0", "7_1", "7_2"]).items()} == {
        "7_0": "RUNNING",
        "7_1": "PENDING",
    }
    answers("sacct", "7_2|CANCELLED by 0|None assigned\\n7_[3-4]|PENDING|\\n")
    assert accounted(["7_2", "7_4"])["7_2"][:2] == ("CANCELLED", "")
    assert accounted(["7_4"])["7_4"].state == "PENDING"
    answers("sacct", "", 1)
    answers("scontrol", "JobId=8 ArrayJobId=7 ArrayTaskId=2 JobState=FAILED NodeList=n3\\n")
    assert accounted(["7_2"])["7_2"][:2] == ("FAILED", "n3")
    answers("squeue", "", 1)
    with pytest.raises(ConnectionError, match="SLURM does not answer: squeue says"):
        queued(["7_0"])
