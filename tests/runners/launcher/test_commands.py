"""Decisions about sweeps, with stand-ins for SLURM's commands and without runs."""

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runners.launcher import commands, jobs, local, task
from runners.launcher.__main__ import launcher_options, main
from runners.launcher.jobs import CANCEL, GO_ON, LOCK, TRAINED, Job, State, _out_of_time, _time_is_up
from runners.launcher.manifest import Sweep
from runners.launcher.ownership import held
from runners.launcher.status import StatusPoller, progress
from runners.launcher.usage import Attempt, _attempts
from runners.tracking.record import Record

SWEEP_JSON = '{"launcher": "local", "options": {}, "overrides": [], "jobs": %s, "submissions": %s}'
LIMITS = {"timeout_min": 60, "max_num_timeout": 3, "signal_delay_s": 120}


def sweep_of(directory: Path, count: int, launcher: str = "slurm") -> Sweep:
    """A sweep that was created and not submitted."""
    sweep = Sweep(directory)
    directory.mkdir()
    sweep.create(launcher, {}, [])
    for number in range(count):
        job: dict[str, Any] = {
            "directory": str(directory / str(number)),
            "overrides": [f"seed={number}"],
            "run_name": "dpo",
            "tracking_uri": f"sqlite:///{directory}/mlflow.db",
            "config": {"name": "a study, of two"},
            "limits": LIMITS,
            "environment": {},
        }
        sweep.add_job(number, job)
    sweep.list_jobs({number: str(directory / str(number)) for number in range(count)})
    return sweep


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for SLURM's commands, which log their arguments; its queue is the file `queue`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "queue").touch()
    squeue = (
        f'case "$*" in *--name*) cut -d"|" -f7,8 {folder}/queue;; *) cut -d"|" -f1-6 {folder}/queue;; esac'
    )
    stands = {"squeue": squeue, "sacct": "true", "scontrol": "true", "sbatch": "echo 7", "scancel": "true"}
    for command, body in stands.items():
        stand(folder, command, body)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("runners.launcher.slurm.AGAIN_AFTER", (0.0,))
    monkeypatch.setattr("runners.launcher.status.PATIENCE", 0.0)
    return folder


def stand(folder: Path, command: str, body: str) -> None:
    (folder / command).write_text(f'#!/bin/sh\necho "{command} $*" >> {folder}/asked\n{body}\n')
    (folder / command).chmod(0o755)


def asked(folder: Path, command: str) -> list[str]:
    lines = (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []
    return [line.removeprefix(f"{command} ") for line in lines if line.startswith(f"{command} ")]


def test_a_submission_is_listed_before_it_is_made_and_found_after_its_launcher_was_killed(tmp_path, slurm):
    sweep = sweep_of(tmp_path / "sweep", 2)
    stand(slurm, "sbatch", f"cp {sweep.directory}/sweep.json {slurm}/before; kill -9 $PPID; exit 1")
    if (child := os.fork()) == 0:
        commands.submit(sweep, [0, 1], sweep.directory / "code")
        os._exit(0)
    os.waitpid(child, 0)
    (noted,) = json.loads((slurm / "before").read_text())["submissions"]
    assert noted["tasks"] == [[0], [1]] and noted["ids"] == {}
    assert noted["name"].startswith("a-study-of-two-")
    commands.adopt(sweep)  # SLURM does not know it yet
    assert sweep.ids() == {}
    lines = [f"9_{index}|PENDING||N/A|4|Priority|9|{noted['name']}\n" for index in (0, 1)]
    (slurm / "queue").write_text("".join(lines))
    commands.adopt(sweep)
    assert sweep.ids() == {0: "9_0", 1: "9_1"}
    assert (sweep.directory / "slurm/9_submission.sh").exists()
    commands.cancel(sweep, [])
    assert asked(slurm, "scancel") == ["9"]


def test_jobs_that_ended_before_anybody_looked_are_known_by_their_own_states(tmp_path, slurm):
    sweep = sweep_of(tmp_path / "sweep", 2)
    sweep.add_submission(sweep.directory / "code", name="lost", tasks=[[0], [1]])
    State("COMPLETED", 1, id="8_1").save(sweep.directory / "1")
    commands.adopt(sweep)
    assert sweep.ids() == {0: "8_0", 1: "8_1"}


def test_where_slurm_may_have_taken_the_jobs_nothing_is_removed_and_cancel_withdraws_them(
    tmp_path, slurm, monkeypatch, capsys
):
    sweep = sweep_of(tmp_path / "sweep", 2)
    stand(slurm, "sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
    with pytest.raises(ConnectionError, match=r"not known whether SLURM took .*`weightgeom sweep status"):
        commands.submit(sweep, [0, 1], sweep.directory / "code")
    (noted,) = sweep.manifest()["submissions"]
    assert not noted.get("withdrawn")
    commands.cancel(sweep, [])
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    task.main([str(sweep.directory), noted["name"]])  # as SLURM starts it, late
    assert "job 1 does not start: it was cancelled since" in capsys.readouterr().out
    assert State.load(sweep.directory / "1") is None


def test_of_two_submissions_of_a_job_the_last_one_counts(tmp_path, monkeypatch, capsys):
    sweep = sweep_of(tmp_path / "sweep", 2)
    for name in ("first", "second"):
        sweep.add_submission(sweep.directory / "code", name=name, tasks=[[1]])
    started: list[str] = []
    monkeypatch.setattr(Job, "__call__", lambda job: started.append(job.directory))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    task.main([str(sweep.directory), "first"])
    assert started == [] and "job 1 does not start: it was submitted again" in capsys.readouterr().out
    task.main([str(sweep.directory), "second"])
    assert started == [f"{sweep.directory}/1"]


def test_a_refused_array_of_several_withdraws_those_before_it(tmp_path, slurm):
    sweep = sweep_of(tmp_path / "sweep", 3)
    stand(slurm, "scontrol", "echo 'MaxArraySize = 3'")
    once = f"mkdir {slurm}/once 2>/dev/null && echo 7"
    stand(slurm, "sbatch", f"{once} || {{ echo 'sbatch: error: no' >&2; exit 1; }}")
    with pytest.raises(ValueError, match="SLURM refuses the jobs: no"):
        commands.submit(sweep, [0, 1, 2], sweep.directory / "code")
    assert [known.get("withdrawn") for known in sweep.manifest()["submissions"]] == [True, True]
    assert asked(slurm, "scancel") == ["7"]


def test_a_job_that_still_runs_somewhere_is_not_started_again(tmp_path, slurm):
    sweep = sweep_of(tmp_path / "sweep", 1)
    with held(sweep.directory / "0" / LOCK, 1, lambda: {"id": "7", "attempt": 1}):
        words = rf"job 0 still runs as process {os.getpid()} on {socket.gethostname()} \(attempt 1 of job 7\)"
        with pytest.raises(ValueError, match=words):
            commands.submit(sweep, [0], sweep.directory / "code")
    assert asked(slurm, "sbatch") == []


def test_two_attempts_of_a_job_do_not_run_at_once_and_a_completed_one_does_not_run_again(
    tmp_path, monkeypatch, capsys
):
    sweep = sweep_of(tmp_path / "sweep", 1, "local")
    directory = sweep.directory / "0"
    monkeypatch.setenv("WEIGHTGEOM_JOB", "local.1.0")
    monkeypatch.setattr(jobs, "PATIENCE", 0.2)
    with held(directory / LOCK, 1), pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        Job(str(directory), slurm=False)()
    assert State.load(directory) is None
    State("COMPLETED", 1, id="local.1.0").save(directory)
    Job(str(directory), slurm=False)()
    assert "nothing to do: attempt 1 completed this job" in capsys.readouterr().out
    assert len((directory / "events.jsonl").read_text().splitlines()) == 1
    monkeypatch.setenv("WEIGHTGEOM_JOB", "local.2.0")  # of a second submission, which waited for the first
    Job(str(directory), slurm=False)()
    state = State.load(directory)
    assert state is not None and (state.id, state.state, state.attempt) == ("local.2.0", "COMPLETED", 1)
    assert len((directory / "events.jsonl").read_text().splitlines()) == 1


def test_a_supervisor_that_outlives_its_killed_launcher_runs_jobs_that_are_known(tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path / "sweep", 1, "local")

    class Killed(BaseException):
        pass

    def dying(*given: object) -> None:
        ids = sweep.ids()
        State("RUNNING", 1, id=ids[0], pid=os.getpid()).save(sweep.directory / "0")
        raise Killed

    monkeypatch.setattr("runners.launcher.local.start_supervisor", dying)
    with held(sweep.directory / "0" / LOCK, 1, lambda: {"id": "7", "attempt": 1}):
        with pytest.raises(Killed):
            monkeypatch.setattr("runners.launcher.commands.holder_of", lambda path: None)
            commands.submit(sweep, [0], sweep.directory / "code")
        assert [job.state for job in StatusPoller(sweep).poll()] == ["RUNNING"]


def test_jobs_of_a_supervisor_that_cannot_start_are_not_counted_as_submitted(tmp_path):
    sweep = sweep_of(tmp_path / "sweep", 1, "local")
    sweep.set_options({"gpus_per_node": 1000})
    with pytest.raises(ValueError, match=r"hydra\.launcher\.gpus_per_node is 1000, but this machine has"):
        commands.submit(sweep, [0], sweep.directory / "code")
    assert sweep.ids() == {} and sweep.manifest()["submissions"][0]["withdrawn"] is True


def test_several_tasks_need_a_training_on_as_many_processes():
    def check(pretraining: int, training: int, objective: bool = True) -> None:
        config = {
            "model": {"pretraining": {"processes": pretraining}},
            "training": {"processes": training},
            "objective": {"_target_": "it"} if objective else {},
        }
        commands._check_tasks("slurm", {"nodes": 2, "tasks_per_node": 2}, [config])

    check(1, 4)
    check(4, 1)
    with pytest.raises(ValueError, match=r"4 processes of .* training.processes=2: set training.processes=4"):
        check(1, 2)
    with pytest.raises(ValueError, match=r"model.pretraining.processes=2: set model.pretraining.processes=4"):
        check(2, 4)
    for none in ((1, 1, True), (1, 4, False)):
        with pytest.raises(ValueError, match=r"none on several: set hydra.launcher.nodes=1 and"):
            check(*none)
    commands._check_tasks("local", {}, [])


def test_an_attempt_that_was_superseded_leaves_the_state_alone(tmp_path):
    earlier = State("RUNNING", 1, id="7_0", pid=os.getpid())
    State("RUNNING", 2, id="7_0", pid=os.getpid()).save(tmp_path)
    Job(str(tmp_path), slurm=True)._fail(earlier, ValueError("too late"))
    state = State.load(tmp_path)
    assert state is not None and (state.state, state.attempt) == ("RUNNING", 2)


def test_the_end_of_the_time_says_whether_the_state_was_saved():
    saved = _out_of_time(LIMITS, "stopped after step 40; its state is saved")
    assert "the state is saved, and resubmit goes on from it" in saved
    measured = _out_of_time(LIMITS, "stopped outside a training")
    assert "the checkpoints and trials that are measured are kept, and resubmit goes on behind" in measured
    assert saved.endswith("--timeout_min 120") and measured.endswith("--timeout_min 120")


def scripts(sweep: Sweep) -> dict[str, list[str]]:
    """The lines of every submitted script by the id of its array."""
    paths = (sweep.directory / "slurm").glob("*_submission.sh")
    return {path.name.partition("_")[0]: path.read_text().splitlines() for path in paths}


@pytest.fixture
def numbering(slurm: Path) -> Path:
    """Makes sbatch give the ids 1, 2, 3, ..."""
    stand(slurm, "sbatch", f"echo x >> {slurm}/count; wc -l < {slurm}/count")
    return slurm


def test_measuring_is_an_array_of_its_own_that_follows_that_of_the_training_task_by_task(tmp_path, numbering):
    sweep = sweep_of(tmp_path / "sweep", 3)
    options = {"gpus_per_node": 1, "measure": {"gpus_per_node": None, "cpus_per_task": 8}}
    sweep.set_options({**options, "report_job": {}, "mail_type": "END"})
    commands.submit(sweep, [0, 1, 2], sweep.directory / "code")
    training, measuring, reporting = (scripts(sweep)[id] for id in "123")
    assert "#SBATCH --gpus-per-node=1" in training and "#SBATCH --array=0-2%3" in training
    assert {"#SBATCH --dependency=aftercorr:1", "#SBATCH --cpus-per-task=8"} <= set(measuring)
    assert "#SBATCH --kill-on-invalid-dep=yes" in measuring and "#SBATCH --array=0-2%3" in measuring
    assert "#SBATCH --dependency=afterany:1:2" in reporting
    with_gpus = [any("gpus" in line for line in lines) for lines in (training, measuring, reporting)]
    mails = [any("mail" in line for line in lines) for lines in (training, measuring, reporting)]
    assert with_gpus == [True, False, False] and mails == [False, False, True]
    assert commands.current_ids(sweep) == {0: "1_0", 1: "1_1", 2: "1_2"}
    (sweep.directory / "1" / TRAINED).write_text('{"device": "cuda"}')
    assert commands.current_ids(sweep) == {0: "1_0", 1: "2_1", 2: "1_2"}
    names = [known["name"] for known in sweep.manifest()["submissions"]]
    assert [known["part"] for known in sweep.manifest()["submissions"]] == ["training", "measuring"]
    lines = [f"1_{index}|RUNNING|n1|4|4|None|1|{names[0]}\n" for index in (0, 2)]
    lines += [f"2_{index}|PENDING||N/A|4|Dependency|2|{names[1]}\n" for index in (0, 1, 2)]
    (numbering / "queue").write_text("".join(lines))
    shown = [(job.id, job.state) for job in StatusPoller(sweep).poll()]
    assert shown == [("1_0", "RUNNING"), ("2_1", "PENDING"), ("1_2", "RUNNING")]
    commands.cancel(sweep, [0])
    commands.cancel(sweep, [])
    assert asked(numbering, "scancel") == ["1_0 2_0", "1 2 3"]


def test_a_sweep_starts_after_all_jobs_of_another_one_and_not_after_one_that_failed(tmp_path, numbering):
    earlier, later = sweep_of(tmp_path / "earlier", 3), sweep_of(tmp_path / "later", 1)
    for name, id in (("training", "4"), ("measuring", "5")):
        ids = {str(number): f"{id}_{number}" for number in (0, 1)}
        earlier.add_submission(earlier.directory / "code", name=name, tasks=[[0], [1]], ids=ids, part=name)
    earlier.add_submission(earlier.directory / "code", name="other", tasks=[[2]], ids={"2": "6"})
    State("COMPLETED", 1, id="6").save(earlier.directory / "2")
    running = ["4_0|RUNNING|n1|4|4|None|4|x\n", "4_1|PENDING||N/A|4|Priority|4|x\n"]
    (numbering / "queue").write_text("".join(running))
    later.set_options({"after": str(earlier.directory), "dependency": "singleton"})
    commands.submit(later, [0], later.directory / "code")
    assert "#SBATCH --dependency=singleton,afterok:5" in scripts(later)["1"]
    State("FAILED", 1, id="4_1").save(earlier.directory / "1")
    (numbering / "queue").write_text(running[0])
    with pytest.raises(ValueError, match=r"jobs 1 of the sweep in .*/earlier did not complete: restart them"):
        commands.submit(later, [0], later.directory / "code")
    assert len(asked(numbering, "sbatch")) == 1


def test_several_jobs_of_a_task_share_its_id(tmp_path, numbering):
    sweep = sweep_of(tmp_path / "sweep", 5)
    sweep.set_options({"jobs_per_task": 2})
    commands.submit(sweep, range(5), sweep.directory / "code")
    assert sweep.manifest()["submissions"][0]["tasks"] == [[0, 1], [2, 3], [4]]
    assert sweep.ids() == {0: "1_0", 1: "1_0", 2: "1_1", 3: "1_1", 4: "1_2"}
    assert "#SBATCH --array=0-2%3" in scripts(sweep)["1"]


def test_what_has_trained_is_only_measured_again(tmp_path, numbering):
    sweep = sweep_of(tmp_path / "sweep", 3)
    sweep.set_options({"measure": {}})
    (sweep.directory / "1" / TRAINED).write_text('{"device": "cpu"}')
    commands.submit(sweep, [0, 1, 2], sweep.directory / "code")
    parts = [(known["part"], known["tasks"]) for known in sweep.manifest()["submissions"]]
    assert parts == [("training", [[0], [2]]), ("measuring", [[0], [2]]), ("measuring", [[1]])]
    last = scripts(sweep)["3"]  # after the other measurements, for array_parallelism
    assert "#SBATCH --dependency=afterany:2" in last and not any("invalid-dep" in line for line in last)
    assert commands.current_ids(sweep) == {0: "1_0", 1: "3", 2: "1_1"}


@pytest.fixture
def signals() -> Iterator[None]:
    """The handlers of signals as they were, behind a job that ran in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_the_two_jobs_of_a_run_start_with_their_part_and_a_trained_one_does_not_train_again(
    tmp_path, monkeypatch, capsys
):
    sweep = sweep_of(tmp_path / "sweep", 1)
    for name in ("training", "measuring"):
        sweep.add_submission(sweep.directory / "code", name=name, tasks=[[0]], part=name)
    ran: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    for variable in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(variable, raising=False)

    def run(job: Job, asked: dict[str, Any], interruption: object) -> None:
        ran.append(str(job.part))
        (sweep.directory / "0" / TRAINED).write_text('{"device": "cpu"}')

    monkeypatch.setattr(Job, "_run", run)
    task.main([str(sweep.directory), "training"])
    assert states_of(sweep) == ["TRAINED"]
    task.main([str(sweep.directory), "training"])  # requeued
    assert "nothing to do: an earlier attempt has trained" in capsys.readouterr().out
    task.main([str(sweep.directory), "measuring"])
    assert ran == ["training", "measuring"] and states_of(sweep) == ["COMPLETED"]


def test_second_jobs_want_a_device_that_may_differ_and_a_report_to_write(tmp_path):
    job = {"directory": str(tmp_path / "0"), "config": {"device": "cuda", "report": False}}
    for options, message in (
        ({"measure": {}}, "set device=auto"),
        ({"report_job": {}}, "report=true: add it"),
    ):
        with pytest.raises(ValueError, match=message):
            commands.launch(tmp_path, "slurm", options, {0: job}, [])


def test_status_leaves_the_end_of_a_sweep_to_the_job_that_writes_its_report(tmp_path, slurm, monkeypatch):
    sweep = sweep_of(tmp_path / "sweep", 1)
    sweep.add_submission(sweep.directory / "code", name="one", tasks=[[0]], ids={"0": "7"})
    State("COMPLETED", 1, id="7").save(sweep.directory / "0")
    sweep.set_report_job("one-report", "8")
    ended: list[bool] = []
    monkeypatch.setattr(commands, "end_sweep", lambda *given: ended.append(True))
    monkeypatch.setattr(commands, "sweep_report", lambda *given: None)
    (slurm / "queue").write_text("8|PENDING||N/A|4|Dependency|8|one-report\n")
    commands.status(sweep)
    assert ended == []
    State("FAILED", 1, id="7").save(sweep.directory / "0")
    with pytest.raises(ChildProcessError, match="1 of 1 jobs of the sweep"):
        commands.status(sweep)
    assert ended == []
    State("COMPLETED", 1, id="7").save(sweep.directory / "0")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    commands.status(sweep)
    assert ended == [True]
    monkeypatch.delenv("SLURM_JOB_ID")
    (slurm / "queue").write_text("8|PENDING||N/A|4|PartitionTimeLimit|8|one-report\n")  # it never will
    commands.status(sweep)
    assert ended == [True, True]


def test_a_job_that_is_over_is_not_cancelled(tmp_path, slurm):
    sweep = sweep_of(tmp_path / "sweep", 2)
    ids = {"0": "7_0", "1": "7_1"}
    sweep.add_submission(sweep.directory / "code", name="one", tasks=[[0], [1]], ids=ids)
    State("COMPLETED", 1, id="7_0").save(sweep.directory / "0")
    lines = [f"7_{index}|RUNNING|n1|4|4|None|7|one\n" for index in (0, 1)]  # its process has not ended yet
    (slurm / "queue").write_text("".join(lines))
    commands.cancel(sweep, [])
    assert asked(slurm, "scancel") == ["7_1"]


def test_options_of_the_launcher_change_at_resubmit(tmp_path, slurm):
    assert launcher_options(["--mem_gb", "64", "--exclude=n1,n2", "--timeout-min", "600"]) == {
        "mem_gb": 64,
        "exclude": "n1,n2",
        "timeout_min": 600,
    }
    with pytest.raises(ValueError, match="expected an option of the launcher"):
        launcher_options(["--mem_gb"])
    for text in ("[1", "!!python/name:os.system", "a: b: c"):
        with pytest.raises(ValueError, match=r"cannot read the value of --mem_gb, .*: put a text in quotes"):
            launcher_options([f"--mem_gb={text}"])
    sweep = sweep_of(tmp_path / "sweep", 1)
    sweep.set_options({"partition": "gpu"})
    with pytest.raises(ValueError, match=r"hydra.launcher.memory"):
        commands.resubmit(sweep, False, {"memory": 3})
    assert sweep.manifest()["options"] == {"partition": "gpu"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no sweep (no sweep.json)"),
        ("", "is damaged (Expecting value"),
        ('{"a": 1}', "is not a sweep's"),
        ("[]", "is damaged (it holds a list): give the directory"),
        ("[" * 100_000, "is damaged (maximum recursion depth exceeded"),
        ('{"a": "\\ud800', "is damaged (Invalid "),
        (
            '{"launcher": 1, "options": {}, "overrides": [], "jobs": {}, "submissions": []}',
            "is not a sweep's",
        ),
        (SWEEP_JSON % ("[1]", "[]"), "is not a sweep's"),
        (SWEEP_JSON % ('{"a": "b"}', "[]"), "is not a sweep's"),
        (SWEEP_JSON % ('{"0": 3}', "[]"), "is not a sweep's"),
        (
            '{"launcher": "local", "options": {}, "overrides": [1], "jobs": {}, "submissions": []}',
            "is not a sweep's",
        ),
        (SWEEP_JSON % ('{"0": "/none"}', "[3]"), "is not a sweep's"),
        (SWEEP_JSON % ('{"0": "/none"}', '[{"ids": 3}]'), "is not a sweep's"),
        (
            SWEEP_JSON % ('{"0": "/none"}', "[]"),
            "has no /none/job.json, which describes job 0: bring the direc",
        ),
        (
            '{"launcher": "local", "options": {}, "overrides": [], "jobs": {}, "submissions": []}',
            "start it again",
        ),
    ],
)
def test_a_foreign_sweep_json_gets_a_sentence(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    assert main(["status", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["state.json", "job.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", '{"status": 3}', "\xff", "[" * 100_000])
def test_a_damaged_file_of_a_job_is_named(tmp_path, name, content, capsys):
    sweep = sweep_of(tmp_path / "sweep", 1, "local")
    (sweep.directory / "0" / name).write_bytes(content.encode("latin-1"))
    assert main(["status", str(sweep.directory)]) == 1
    error = capsys.readouterr().err
    assert f"0/{name} " in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(
            ("job.json", field, None)
            for field in ("directory", "run_name", "tracking_uri", "config", "limits")
        ),
        *(("job.json", "overrides", value) for value in (None, 3, [1])),
        *(("job.json", "config", value) for value in ([1], {}, {"name": 3})),
        *(("state.json", field, {}) for field in ("state", "id", "node", "process_start", "error")),
        *(
            ("state.json", field, value)
            for field in ("pid", "attempt", "began")
            for value in (None, "7", True)
        ),
    ],
)
def test_a_field_of_another_kind_in_a_file_of_a_job_is_named(tmp_path, name, field, value, capsys):
    sweep = sweep_of(tmp_path / "sweep", 1, "local")
    path = sweep.directory / "0" / name
    State("FAILED", 1, 0, "local.1.0", 1.0, "here", 7, "8").save(path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert main(["status", str(sweep.directory)]) == 1
    error = capsys.readouterr().err
    assert f"0/{name} is damaged (" in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_state_without_a_process_is_not_alive():
    assert not State("RUNNING", node=socket.gethostname()).alive()


@pytest.mark.parametrize("poll", ["-1", "0", "nan", "inf", "x"])
def test_a_poll_without_a_length_is_refused(tmp_path, poll, capsys):
    with pytest.raises(SystemExit):
        main(["wait", str(tmp_path), "--poll", poll])
    assert f"argument --poll: invalid seconds value: '{poll}'" in capsys.readouterr().err


def test_an_unknown_number_is_not_cancelled_in_silence(tmp_path, slurm, capsys):
    sweep = sweep_of(tmp_path / "a sweep", 2)
    assert main(["cancel", str(sweep.directory), "9"]) == 1
    assert "has no job 9; its jobs are 0 to 1" in capsys.readouterr().err


@pytest.fixture
def packed(tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep of four jobs in one task, in which this process is."""
    sweep = sweep_of(tmp_path / "sweep", 4)
    sweep.add_submission(sweep.directory / "code", name="packed", tasks=[[0, 1, 2, 3]], ids={})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr("runners.launcher.warm.gpus", list)
    for variable in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    return sweep


def states_of(sweep: Sweep) -> list[str | None]:
    states = [State.load(directory) for directory in sweep.jobs().values()]
    return [None if state is None else state.state for state in states]


def test_jobs_of_one_task_run_in_turn_share_their_imports_and_end_each_on_its_own(packed, monkeypatch):
    (packed.directory / "2" / CANCEL).touch()

    def run(job: Job, asked: dict[str, Any], interruption: object) -> None:
        print("imported:", "colorsys" in sys.modules)
        importlib.import_module("colorsys")
        if job.directory.endswith("1"):
            raise ValueError("no luck with postgresql://me:secret@host/db")

    monkeypatch.setattr(Job, "_run", run)
    sys.modules.pop("colorsys", None)
    with pytest.raises(SystemExit, match="1"):
        task.main([str(packed.directory), "packed"])
    ended = ["COMPLETED", "FAILED", "CANCELLED", "COMPLETED"]
    assert states_of(packed) == ended
    logs = [packed.directory / number / "log.txt" for number in "013"]
    assert ["imported: True" in log.read_text() for log in logs] == [False, True, True]
    assert "ValueError: no luck" in logs[1].read_text() and "secret" not in logs[1].read_text()
    with pytest.raises(SystemExit, match="1"):  # requeued: those that have ended are left alone
        task.main([str(packed.directory), "packed"])
    assert states_of(packed) == ended
    assert len((packed.directory / "0/events.jsonl").read_text().splitlines()) == 2


def test_in_a_task_of_several_a_killed_job_is_known_and_the_end_of_its_time_reaches_the_running_one(
    packed, slurm, monkeypatch
):
    def run(job: Job, asked: dict[str, Any], interruption: object) -> None:
        if job.directory.endswith("0"):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.directory.endswith("1"):
            os.kill(os.getppid(), signal.SIGUSR2)  # to the task alone
            time.sleep(60)

    monkeypatch.setattr(Job, "_run", run)
    monkeypatch.setattr(task, "TICK", 0.02)
    handler = signal.getsignal(signal.SIGUSR2)
    try:
        with pytest.raises(SystemExit, match=str(GO_ON)):
            task.main([str(packed.directory), "packed"])
    finally:
        signal.signal(signal.SIGUSR2, handler)
    assert states_of(packed) == ["KILLED", "INTERRUPTED", None, None]
    assert asked(slurm, "scontrol")[-1] == "requeue 7"
    packed.amend_submission(0, ids=dict.fromkeys("0123", "7"))
    (slurm / "queue").write_text("7|RUNNING|n1|4|4|None|7|packed\n")
    polled = {job.number: job for job in StatusPoller(packed).poll()}
    assert [polled[number].state for number in (0, 2)] == ["KILLED", "PENDING"]
    assert polled[0].error == "killed by signal 9" and polled[0].log == packed.directory / "0/log.txt"


def test_a_job_that_slurm_has_requeued_already_is_not_requeued_again(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stand(slurm, "scontrol", "echo JobId=7 Restarts=2 BatchFlag=1")
    jobs.requeue(1)
    assert asked(slurm, "scontrol") == ["-o show job 7"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    jobs.requeue(1)
    assert asked(slurm, "scontrol")[1:] == ["-o show job 7", "requeue 7"]


def test_a_sweep_after_another_depends_on_its_arrays_and_is_refused_where_it_failed(tmp_path, slurm):
    earlier, sweep = sweep_of(tmp_path / "earlier", 2), sweep_of(tmp_path / "later", 1)
    sweep.set_options({"after": str(earlier.directory)})
    earlier.add_submission(earlier.directory / "code", name="e", tasks=[[0], [1]])
    earlier.amend_submission(0, ids={"0": "5_0", "1": "5_1"})
    (slurm / "queue").write_text("5_0|RUNNING|n1|4|4|None|5|e\n5_1|PENDING||N/A|4|Priority|5|e\n")
    commands.submit(sweep, [0], sweep.directory / "code")
    script = (sweep.directory / "slurm/7_submission.sh").read_text()
    assert "#SBATCH --dependency=afterok:5" in script.splitlines()
    (slurm / "queue").write_text("")
    with pytest.raises(ValueError, match=r"jobs 0, 1 of the sweep in .* did not complete: restart them with"):
        commands.submit(sweep, [0], sweep.directory / "code")


# 60 min less 120 s to save, less 60 s by which SLURM may be early, are 3420 s.
def test_the_end_of_the_time_is_told_from_a_preemption_by_the_processs_own_clock(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1")  # of a controller whose clock is elsewhere
    now = time.monotonic()
    assert _time_is_up(LIMITS, now - 3430) and not _time_is_up(LIMITS, now - 1800)
    assert not _time_is_up({**LIMITS, "timeout_min": None}, now - 3430)


def test_a_sweep_whose_launcher_was_killed_before_it_had_a_record_is_shown_and_resubmitted(
    tmp_path, slurm, capsys
):
    sweep = sweep_of(tmp_path / "sweep", 1)
    sweep.add_job(0, {**sweep.job(0), "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})
    record = Record(sweep.directory / "record")
    for command in ("status", "wait"):
        assert main([command, str(sweep.directory)]) == 1
        assert f"weightgeom sweep resubmit {sweep.directory}" in capsys.readouterr().err
    assert not record.described()
    record.directory.mkdir()
    (record.directory / "status.json").write_text("{}")  # the first of its files
    assert main(["resubmit", str(sweep.directory)]) == 0
    assert sweep.ids() == {0: "7"} and record.status()["status"] == "RUNNING"


DAMAGED = (b"[]", b"3", b"[" * 10_000, b"torn", b"\xff", b"{}", b'{"key": 3, "value": "x", "step": []}')


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_lines_of_a_job_are_left_out_of_its_progress_and_usage(line, tmp_path):
    point = json.dumps({"key": "train/loss", "value": 2.5, "step": 3}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(point + b"\n" + line + b"\n")
    assert progress(tmp_path) == "train step 3, loss 2.5"
    begun, ended = ({"id": "7_0", "attempt": 1, "state": state, "time": time} for state, time in EVENTS)
    lines = (line, json.dumps(begun).encode(), line, json.dumps(ended).encode(), line)
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines))
    assert list(_attempts(tmp_path / "events.jsonl")) == [(("7_0", 0), Attempt(True, 5.0))]


EVENTS = (("RUNNING", 10.0), ("COMPLETED", 15.0))


def test_a_damaged_plan_of_a_supervisor_says_nothing_of_its_process(tmp_path):
    sweep = sweep_of(tmp_path / "sweep", 1, "local")
    path = sweep.directory / "supervisor.1.json"
    for plan in ("[]", "{}", json.dumps({"host": socket.gethostname(), "pie": 1}), "torn", "[" * 100_000):
        path.write_text(plan)
        assert not local.has_supervisor(sweep)
