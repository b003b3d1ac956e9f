"""Sweeps on a real SLURM: started, left, found again, failed, cancelled, and refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from app import ROOT, environment, fresh_run
from cluster import Cluster, base
from sweeps import TINY, Place, directory, events, rows, states, steps, until

from runners.launcher.manifest import Sweep

SLURM = "hydra/launcher=slurm"
TWO = "hydra.launcher.array_parallelism=2"
# A training that is not over before a test has done what it wants to do to it.
LONG = ["training.steps=3000", "seed=9"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.fixture(scope="module")
def place(cluster: Cluster, outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("sweeps")
    shutil.copytree(outputs, home / "outputs")
    return cluster.at(home)


@pytest.fixture(scope="module")
def no_accounting(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which sacct fails, as it does where there is no accounting."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    (folder / "sacct").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_detached_sweep_returns_at_once_and_is_found_again(cluster, place, no_accounting):
    ended = place.sweep(SLURM, TWO, "hydra.launcher.detach=true", "name=detached", "seed=0,1,2,3")
    assert ended.code == 0, ended.err
    sweep = directory(ended)
    job = base(sweep)
    assert all(f"#{number}  {job}_{number}  seed={number}" in ended.out for number in range(4))
    assert f"weightgeom sweep wait {sweep}" in ended.out
    with place.popen("wait", sweep, "--poll", "0.3") as waiting:
        most = 0
        while waiting.poll() is None:
            most = max(most, cluster.running(sweep))
            time.sleep(0.2)
        assert waiting.returncode == 0
    assert most == 2
    assert cluster.accounted(sweep) == [f"{job}_{number}|COMPLETED|0:0" for number in range(4)]
    assert place.statuses("detached") == ("FINISHED", dict.fromkeys("0123", "FINISHED"))
    assert all(steps(sweep, number) == [1, 2] for number in range(4))
    for more in ({}, {"PATH": no_accounting}):
        shown = place.command("status", sweep, **more)
        assert shown.code == 0 and rows(shown) == dict.fromkeys(range(4), "COMPLETED")


def test_a_sweep_whose_watcher_is_killed_goes_on_and_what_failed_of_it_is_started_again(cluster, place):
    # Seeds 0 and 1 diverge at a rate that no training survives, and 2 and 3 have it from their own override.
    rates = "training.learning_rate=1e30,1e-4"
    command = [sys.executable, str(ROOT / "run.py"), *TINY, SLURM, "name=failing", rates, "seed=0,1", "-m"]
    with subprocess.Popen(
        command, cwd=place.home, env=environment(place.variables), stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        sweep = next(Path(line[7:].strip()) for line in watcher.stdout if line.startswith("sweep: "))
        watcher.kill()
    job = base(sweep)
    waited = place.command("wait", sweep, "--poll", "0.3")
    assert waited.code == 1 and "2 of 4 jobs of the sweep" in waited.err
    shown = place.command("status", sweep)
    assert shown.code == 1
    assert rows(shown) == {0: "FAILED", 1: "FAILED", 2: "COMPLETED", 3: "COMPLETED"}
    for output in (waited.out, shown.out):
        assert output.count("FloatingPointError: training diverged") >= 2
        assert output.count("weightgeom/training/callbacks.py") >= 2  # the frame that raised
        assert all(f"log: {sweep}/slurm/{job}_{number}_0_log.out" in output for number in (0, 1))
    accounted = cluster.accounted(sweep)
    assert accounted[:2] == [f"{job}_0|FAILED|1:0", f"{job}_1|FAILED|1:0"]
    assert accounted[2:] == [f"{job}_2|COMPLETED|0:0", f"{job}_3|COMPLETED|0:0"]
    again = place.command("resubmit", sweep)
    assert again.code == 0, again.err
    assert "submitted 2 jobs to SLURM" in again.out
    assert place.command("wait", sweep, "--poll", "0.3").code == 1
    assert [event["attempt"] for event in events(sweep, 0)] == [1, 1, 2, 2]
    assert states(sweep, 2) == ["RUNNING", "COMPLETED"]
    assert base(sweep) != job and len(cluster.accounted(sweep)) == 2


def test_cancelled_jobs_are_told_from_failed_ones_and_killed_in_mlflow(cluster, place, no_accounting):
    limits = ["hydra.launcher.array_parallelism=1", "hydra.launcher.cpus_per_task=2"]
    sweep = place.started(SLURM, *limits, "name=cancelled", "training.steps=3000", "seed=9,8")
    until(lambda: steps(sweep, 0))
    job = base(sweep)
    cluster.ask("scancel", f"{job}_0", f"{job}_1")
    start = time.monotonic()
    waited = place.command("wait", sweep, "--poll", "0.3", PATH=no_accounting)
    assert waited.code == 1 and time.monotonic() - start < 60
    shown = place.command("status", sweep)
    assert shown.code == 1 and rows(shown) == {0: "CANCELLED", 1: "CANCELLED"}
    assert place.statuses("cancelled") == ("KILLED", {"9": "KILLED", "8": "KILLED"})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("hydra.launcher.partition=nowhere", "invalid partition specified: nowhere"),
        ("hydra.launcher.gres='gpu:99'", "Requested node configuration is not available"),
        ("hydra.launcher.mem_gb=much", "hydra.launcher.mem_gb should be a valid number"),
    ],
)
def test_what_slurm_refuses_is_told_in_a_sentence_and_leaves_nothing(place, option, message):
    before = sorted((place.home / "outputs").rglob("*"))
    ended = place.sweep(SLURM, option, "name=refused", "seed=0,1")
    assert ended.code == 1
    (error,) = ended.errors
    assert message in error
    assert "Traceback" not in ended.err
    assert sorted((place.home / "outputs").rglob("*")) == before


def test_a_job_has_the_gpu_that_it_asked_for(cluster, place):
    sweep = place.started(SLURM, "hydra.launcher.gpus_per_node=1", "name=gpus", "seed=0,1")
    assert place.command("wait", sweep, "--poll", "0.3").code == 0
    given = [events(sweep, number)[0]["gpus"] for number in (0, 1)]
    assert given == ["0", "1"] or set(given) == {"0"}  # both on one node, or each on its own


def test_a_job_ended_by_its_python_is_failed_and_goes_on_from_the_state_before_a_torn_one(cluster, place):
    sweep = place.started(SLURM, "name=torn", *LONG, "training.steps=120", "training.save_every=10")
    until(lambda: max(steps(sweep), default=0) > 40)
    os.kill(events(sweep)[0]["pid"], signal.SIGKILL)
    assert place.command("wait", sweep, "--poll", "0.3").code == 1
    assert cluster.accounted(sweep)[0].split("|")[1] == "FAILED"
    (training,) = {path.parent for path in (place.home / "outputs/training").glob("*/checkpoint-*0")}
    newest, older = sorted(training.glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))[:2]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert place.command("resubmit", sweep).code == 0
    assert place.command("wait", sweep, "--poll", "0.3").code == 0
    log = (sweep / f"slurm/{base(sweep)}_0_log.out").read_text()
    assert f"{newest.name}: " in log and "trying an older state" in log
    assert f"resuming from step {older.name[11:]}" in log
    assert steps(sweep) == list(range(1, 121))
    assert place.statuses("torn") == ("FINISHED", {"9": "FINISHED"})


def test_a_controller_that_is_gone_for_a_while_costs_nothing_but_new_sweeps(cluster, place):
    sweep = place.started(SLURM, "name=outage", "training.steps=60", "seed=5,6")
    until(lambda: steps(sweep, 0))
    with place.popen("wait", sweep, "--poll", "0.3") as waiting:
        cluster.script("kill-controller")
        gone = time.monotonic()
        ended = place.sweep(SLURM, "hydra.launcher.detach=true", "name=meanwhile", "seed=0")
        assert ended.code == 1 and len(ended.errors) == 1 and "SLURM does not answer" in ended.errors[0]
        time.sleep(max(0, gone + 20 - time.monotonic()))
        cluster.script("start-controller")
        out, err = waiting.communicate(timeout=900)
        assert waiting.returncode == 0, out + err
    assert place.statuses("outage") == ("FINISHED", {"5": "FINISHED", "6": "FINISHED"})
    repeated = place.started(SLURM, "name=meanwhile", "seed=0")
    assert place.command("wait", repeated, "--poll", "0.3").code == 0


def test_more_jobs_than_an_array_may_have_are_submitted_in_chunks_and_cancelled(cluster, place):
    hold = "hydra.launcher.additional_parameters={hold: true}"
    # A controller keeps the limit that its first array met: let that be the usual one.
    assert place.command("cancel", place.started(SLURM, hold, "name=usual", "seed=0,1")).code == 0
    configuration = cluster.directory / "etc/slurm.conf"
    before = configuration.read_text()
    configuration.write_text(before + "MaxArraySize=4\n")
    cluster.ask("scontrol", "reconfigure")
    try:
        sweep = place.started(SLURM, hold, "name=chunks", "seed=0,1,2,3,4")
    finally:
        configuration.write_text(before)
        cluster.ask("scontrol", "reconfigure")
    first, second = (list(known["ids"].values()) for known in Sweep(sweep).manifest()["submissions"])
    assert (len(first), len(second)) == (3, 2)
    arrays = [ids[0].partition("_")[0] for ids in (first, second)]
    assert cluster.ask("squeue", "-h", "-r", "-j", ",".join(arrays)).count("\n") == 5
    assert f"afterany:{arrays[0]}" in cluster.ask("scontrol", "show", "job", second[0])
    assert place.command("cancel", sweep).code == 0
    until(lambda: not cluster.ask("squeue", "-h", "-j", ",".join(arrays)))


def test_a_hundred_jobs_are_one_array_that_costs_a_few_times_one_job(cluster, place):
    hold = "hydra.launcher.additional_parameters={hold: true}"

    def submitted(seeds: str) -> tuple[Path, float]:
        asked = [*TINY, SLURM, hold, "hydra.launcher.detach=true", "name=hundred", f"seed={seeds}", "-m"]
        start = os.times()
        ended = fresh_run(place.home, *asked, **place.variables)
        end = os.times()
        assert ended.code == 0, ended.err
        return directory(ended), sum(end[2:4]) - sum(start[2:4])  # processor time of the children

    single, alone = submitted("99")
    hundred, together = submitted("range(100,200)")
    assert together < 5 * alone
    assert [len(known["ids"]) for known in Sweep(hundred).manifest()["submissions"]] == [100]
    for sweep in (single, hundred):
        assert place.command("cancel", sweep).code == 0
    until(lambda: not cluster.ask("squeue", "-h", "-r", "-t", "PD", "-o", "%i").strip())
