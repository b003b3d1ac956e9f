"""Sweeps on this machine, without SLURM: parallelism, reattaching, failures, cancelling and time limits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from app import ROOT, Ended, environment, run
from mlflow import MlflowClient
from sweeps import TINY, Place, directory, events, rows, states, steps, until, weights

from runners.launcher.local import LocalOptions, Supervisor
from runners.launcher.manifest import Sweep

ONE, TWO = ("hydra.launcher.array_parallelism=" + jobs for jobs in "12")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("local"))
    assert run(made.home, *TINY, "objective=none").code == 0
    return made


def overlap(sweep: Path, jobs: int) -> int:
    """The largest number of jobs that ran at a time, by their logs of events."""
    times = [(events(sweep, number)[0]["time"], events(sweep, number)[-1]["time"]) for number in range(jobs)]
    return max(sum(start <= moment < end for start, end in times) for moment, _ in times)


def test_a_detached_sweep_runs_two_at_a_time_on_its_own_copy_of_the_code(place):
    unset = Place(place.home, {"OMP_NUM_THREADS": ""})  # so that the supervisor distributes the cores
    ended = unset.sweep("hydra.launcher.detach=true", TWO, "name=detached", "seed=0,1,2")
    assert ended.code == 0, ended.err
    sweep = directory(ended)
    (plan,) = sweep.glob("supervisor.*.json")
    each = max(1, len(os.sched_getaffinity(0)) // 2)
    assert json.loads(plan.read_text())["environment"] == {"OMP_NUM_THREADS": str(each)}
    assert f"reattach: weightgeom sweep wait {sweep}" in ended.out
    assert place.command("status", sweep).code == 0  # no job has failed so far
    waited = place.command("wait", sweep)
    assert waited.code == 0, waited.out + waited.err
    assert overlap(sweep, 3) == 2
    assert place.statuses("detached") == ("FINISHED", dict.fromkeys("012", "FINISHED"))
    assert all(steps(sweep, number) == [1, 2] for number in range(3))
    assert rows(place.command("status", sweep)) == dict.fromkeys(range(3), "COMPLETED")
    _, children = place.runs("detached")
    assert children["0"].data.tags["git_commit"] == git("rev-parse", "HEAD")
    copy, original = (place / "weightgeom/table.py" for place in (sweep / "code", ROOT))
    assert copy.read_text() == original.read_text()


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


def test_jobs_keep_running_when_the_launching_process_is_interrupted(place):
    command = [sys.executable, str(ROOT / "run.py"), *TINY, TWO, "name=left", "seed=3,4", "-m"]
    with subprocess.Popen(
        command,
        cwd=place.home,
        env=environment({}),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as watcher:
        assert watcher.stdout is not None
        sweep = next(Path(line[7:].strip()) for line in watcher.stdout if line.startswith("sweep: "))
        next(line for line in watcher.stdout if "RUNNING" in line)
        os.killpg(watcher.pid, signal.SIGINT)  # as a terminal does on Ctrl-C, to its foreground group
        output = watcher.stdout.read()
    assert watcher.returncode == 130
    assert f"jobs keep running; reattach with: weightgeom sweep wait {sweep}" in output
    assert place.command("wait", sweep).code == 0
    assert place.statuses("left") == ("FINISHED", {"3": "FINISHED", "4": "FINISHED"})


def test_failed_jobs_are_listed_and_only_they_are_restarted(place):
    ended = place.sweep(TWO, "name=failing", "training.learning_rate=1e30,1e-4", "seed=0")
    assert ended.code == 1 and len(ended.errors) == 1 and "1 of 2 jobs of the sweep" in ended.errors[0]
    sweep = directory(ended)
    assert "FloatingPointError: training diverged" in ended.out
    assert "weightgeom/training/callbacks.py" in ended.out  # the frame that raised
    assert f"log: {sweep}/0/log.txt" in ended.out and "site-packages/trl" not in ended.out
    assert "Traceback" in (sweep / "0/traceback.txt").read_text()
    shown = place.command("status", sweep)
    assert shown.code == 1 and rows(shown) == {0: "FAILED", 1: "COMPLETED"}
    again = place.command("resubmit", sweep)
    assert again.code == 0 and "started 1 jobs" in again.out
    assert place.command("wait", sweep).code == 1
    assert states(sweep, 0) == ["RUNNING", "FAILED"] * 2
    assert states(sweep, 1) == ["RUNNING", "COMPLETED"]


def test_a_sweep_ends_in_its_report_and_runs_only_the_probes_of_each_objective(place):
    probes = ["probe=[rsf,behaviour]", "probe.rsf.tokens=256", "probe.behaviour.tokens=256"]
    overrides = [*probes, "+only.behaviour=[dpo]", "report=true", "name=reported", "objective=dpo,ce"]
    pages = place.home / "outputs/report"
    pages.touch()  # a file in place of the directory
    ended = place.sweep(*overrides)
    sweep = directory(ended)
    assert ended.code == 1 and "the jobs completed, but no report was made" in ended.errors[0]
    assert rows(place.command("status", sweep)) == {0: "COMPLETED", 1: "COMPLETED"}
    tables = [{path.stem for path in sweep.glob(f"{n}/record/artifacts/tables/rsf*.csv")} for n in (0, 1)]
    behaviour = [(sweep / f"{n}/record/artifacts/tables/behaviour.csv").exists() for n in (0, 1)]
    names = {f"rsf{past}{end}" for past in ("", "_pretraining") for end in ("", "_means", "_parameters")}
    assert tables == [names] * 2 and behaviour == [True, False]
    pages.unlink()
    ended = place.sweep(*overrides, "seed=1")
    assert ended.code == 0 and f"report: {pages}/reported/index.html" in ended.out
    client = MlflowClient(f"sqlite:///{place.home}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("reported")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if f"{directory(ended)}" == run.data.tags.get("sweep"))
    page = client.download_artifacts(parent.info.run_id, "report.html", str(place.home))
    assert "4 finished runs" in Path(page).read_text()


def test_cancelled_jobs_have_status_killed_in_mlflow_and_resume_when_they_are_resubmitted(place):
    options = ["training.steps=400", "training.save_every=10"]
    sweep = place.started(ONE, "name=cancelled", *options, "seed=7,8")
    until(lambda: max(steps(sweep, 0), default=0) > 20)
    assert place.command("cancel", sweep).code == 0
    waited = place.command("wait", sweep)
    assert waited.code == 1 and "cancelled: #0" in waited.out and "were cancelled" in waited.err
    assert "Traceback" not in waited.out and "log: None" not in waited.out
    assert rows(place.command("status", sweep)) == {0: "CANCELLED", 1: "CANCELLED"}
    assert place.statuses("cancelled") == ("KILLED", {"7": "KILLED", "8": "KILLED"})
    assert not alive(sweep, 0)
    assert place.command("resubmit", sweep).code == 0
    assert place.command("wait", sweep).code == 0
    assert steps(sweep, 0) == list(range(1, 401))
    assert "resuming from step" in (sweep / "0/log.txt").read_text()
    assert place.statuses("cancelled") == ("FINISHED", {"7": "FINISHED", "8": "FINISHED"})


def alive(sweep: Path, number: int) -> bool:
    return Path(f"/proc/{events(sweep, number)[0]['pid']}").exists()


def test_at_a_time_limit_a_job_saves_its_state_and_resumes_without_losing_a_step(place):
    whole = ["training.steps=130", "seed=5"]
    limit = ["hydra.launcher.timeout_min=0.9", "hydra.launcher.signal_delay_s=34", TWO]  # ample time to save
    often = "hydra.launcher.max_num_timeout=30"
    sweep = place.started(*limit, often, "name=limited", *whole, "outputs=limited")
    with place.popen("wait", sweep) as waiting:
        assert run(place.home, *TINY, *whole).code == 0
        assert waiting.wait(400) == 0
    cut = [event for event in events(sweep) if event["state"] == "INTERRUPTED"]
    assert [event["timeouts"] for event in cut] == list(range(1, len(cut) + 1))
    assert steps(sweep) == list(range(1, 131))
    expected, limited = weights(place.home, 130), weights(place.home, 130, "limited")
    assert all(torch.equal(limited[name], weight) for name, weight in expected.items())


def test_jobs_without_their_process_or_their_supervisor_are_reported_as_ended(place):
    sweep = place.started(ONE, "name=killed", "training.steps=3000", "seed=1,2")
    until(lambda: steps(sweep, 0))
    (plan,) = sweep.glob("supervisor.*.json")
    os.kill(json.loads(plan.read_text())["pid"], signal.SIGKILL)
    assert rows(place.command("status", sweep)) == {0: "RUNNING", 1: "CANCELLED"}
    os.kill(events(sweep)[0]["pid"], signal.SIGKILL)

    def killed() -> Ended | None:
        ended = place.command("status", sweep)
        return ended if ended.code and rows(ended)[0] == "KILLED" else None

    ended = until(killed)
    assert "its process is gone" in ended.out and "no supervisor is left to start it" in ended.out
    assert place.statuses("killed") == ("FAILED", {"1": "KILLED", "2": "KILLED"})


def test_gpus_are_distributed_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert LocalOptions().parallelism(9) == 3
    assert LocalOptions(gpus_per_node=2).parallelism(9) == 1
    assert LocalOptions(array_parallelism=5).parallelism(4) == 4
    with pytest.raises(ValueError, match="gpus_per_node is 4, but this machine has 3 GPUs: set"):
        LocalOptions(gpus_per_node=4).parallelism(9)
    (tmp_path / "sweep.json").write_text('{"jobs": {}}')

    def given(slot: int, each: int | None, available: list[str]) -> str | None:
        plan = {"ids": {}, "gpus": available, "gpus_per_job": each}
        return Supervisor(Sweep(tmp_path), plan)._gpus(slot).get("CUDA_VISIBLE_DEVICES")

    assert [given(slot, None, ["4", "5", "6"]) for slot in range(4)] == ["4", "5", "6", "4"]
    assert given(1, 2, ["0", "1", "2", "3"]) == "2,3"
    assert given(0, 0, ["0"]) == ""  # gpus_per_node=0 hides them
    assert given(0, None, []) is None


def test_a_directory_without_a_sweep_and_an_invalid_option_get_one_sentence(place, tmp_path):
    ended = place.command("status", tmp_path)
    assert ended.code == 1 and f"{tmp_path} holds no sweep" in ended.err and "Traceback" not in ended.err
    before = sorted((place.home / "outputs/jobs").rglob("*"))
    ended = place.sweep("hydra.launcher.array_parallelism=0", "seed=0,1")
    assert ended.code == 1 and "hydra.launcher.array_parallelism" in ended.errors[0]
    with_slurm = Place(place.home, {"PATH": "/nowhere"})
    ended = with_slurm.sweep("hydra/launcher=slurm", "seed=0,1")
    assert ended.code == 1 and "there is no SLURM here (sbatch is not on PATH)" in ended.errors[0]
    assert sorted((place.home / "outputs/jobs").rglob("*")) == before
