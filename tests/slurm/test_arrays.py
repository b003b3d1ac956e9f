"""One task of an array is one task; a submission has one writer and is found again."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from cluster import Cluster, base
from sweeps import Place, directory, events, rows, states, steps, until

from runners.launcher.manifest import Sweep

SLURM = "hydra/launcher=slurm"
HELD = "hydra.launcher.additional_parameters={hold: true}"
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.fixture(scope="module")
def place(cluster: Cluster, outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("arrays") / "a home"  # printed commands are quoted
    home.mkdir()
    shutil.copytree(outputs, home / "outputs")
    return cluster.at(home)


def test_the_interruption_of_an_arrays_last_task_leaves_the_others_alone(cluster, place):
    lengths = "training.steps=3,2000,2001,2002,2003"
    sweep = place.started(SLURM, HELD, "hydra.launcher.timeout_min=30", "name=array", "seed=4", lengths)
    array = base(sweep)
    cluster.ask("scontrol", "release", f"{array}_0")
    until(lambda: states(sweep, 0)[-1:] == ["COMPLETED"])
    assert place.command("cancel", sweep, "2").code == 0
    cluster.ask("scontrol", "release", array)
    until(lambda: all(max(steps(sweep, number), default=0) > 15 for number in (1, 3, 4)))
    raw = cluster.ask("sacct", "-n", "-X", "-P", "-j", f"{array}_4", "-o", "JobIDRaw")
    assert raw.split() == [array]  # the last one has the id of the array
    cluster.ask("scontrol", "requeuehold", f"{array}_1")
    cluster.ask("scancel", "-s", "USR2", f"{array}_4")
    until(lambda: states(sweep, 4) == ["RUNNING", "INTERRUPTED", "RUNNING"])
    assert states(sweep, 0) == ["RUNNING", "COMPLETED"]
    assert states(sweep, 1) == states(sweep, 3) == ["RUNNING"] and states(sweep, 2) == []
    shown = place.command("status", sweep)
    expected = {0: "COMPLETED", 1: "PENDING", 2: "CANCELLED", 3: "RUNNING", 4: "RUNNING"}
    assert rows(shown) == expected
    assert f"it is held: release it with `scontrol release {array}_1`" in shown.out
    assert place.command("cancel", sweep).code == 0
    waited = place.command("wait", sweep, "--poll", "0.3")
    assert waited.code == 1 and "4 of 5 jobs of the sweep" in waited.err and "were cancelled" in waited.err
    assert "Traceback" not in waited.out and "log: None" not in waited.out
    ended = cluster.ask("sacct", "-n", "-D", "-X", "-P", "-j", f"{array}_0", "-o", "State")
    assert ended.split() == ["COMPLETED"]
    assert steps(sweep, 4) == list(range(1, steps(sweep, 4)[-1] + 1))


def test_a_job_that_cannot_start_is_told_with_the_reason_whatever_the_environment_and_started_with_less(
    cluster, place
):
    cluster.ask("scontrol", "create", "partitionname=short", "nodes=n1", "maxtime=5")
    ended = place.sweep(SLURM, "hydra.launcher.partition=short", "hydra.launcher.poll_s=0.3", "name=stuck")
    assert ended.code == 1
    # SLURM gives the one reason or the other.
    assert re.search(r"cannot start as it is \((PartitionTimeLimit|PartitionConfig): ", ended.out)
    assert "1 of 1 jobs of the sweep in" in ended.err and "cannot start (reasons above)" in ended.err
    sweep = directory(ended)
    assert f"resubmit '{sweep}'" in ended.err
    disturbed = {"SQUEUE_STATES": "R", "SACCT_STATE": "COMPLETED", "SLURM_JOB_ID": "1", "SQUEUE_SORT": "x"}
    assert rows(place.command("status", sweep, **disturbed)) == {0: "PENDING"}
    assert place.command("cancel", sweep).code == 0
    again = place.command("resubmit", sweep, "--timeout_min", "4", **disturbed)
    assert again.code == 0, again.err
    waited = place.command("wait", sweep, "--poll", "0.3")
    assert waited.code == 0, waited.out + waited.err


@pytest.fixture
def container(tmp_path: Path) -> str:
    """A PATH with an `apptainer` that runs a command with a python3 of its own and without SLURM."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
    skip = 'while [ "${1#-}" != "$1" ]; do shift; done; shift'
    (outside / "apptainer").write_text(f'#!/bin/bash\nshift\n{skip}\nPATH={inside}:$PATH exec "$@"\n')
    (inside / "python3").write_text(f'#!/bin/sh\nIMAGE=lab.sif exec {sys.executable} "$@"\n')
    (inside / "scontrol").write_text("#!/bin/sh\necho 'no SLURM in a container' >&2\nexit 1\n")
    for path in (outside / "apptainer", inside / "python3", inside / "scontrol"):
        path.chmod(0o755)
    return f"{outside}:{os.environ['PATH']}"


def test_a_run_trains_and_is_measured_in_two_jobs_in_a_container_and_a_last_one_writes_the_report(
    cluster, place, container
):
    within = Place(place.home, {**place.variables, "PATH": container})
    parts = ["hydra.launcher.measure={mem_gb: 0.7}", "hydra.launcher.report_job={mem_gb: 0.6}", "report=true"]
    lengths = ["name=parts", "seed=4", "training.steps=60,2000", "hydra.launcher.container=lab.sif"]
    sweep = within.started(SLURM, *parts, *lengths)
    training, measuring = (list(known["ids"].values()) for known in Sweep(sweep).manifest()["submissions"])
    array = training[0].partition("_")[0]
    until(lambda: max(steps(sweep, 0), default=0) > 5)
    cluster.ask("scancel", "-s", "USR2", training[0])
    until(lambda: states(sweep, 0)[:2] == ["RUNNING", "INTERRUPTED"])
    cluster.ask("scancel", training[1])  # its measurements cannot start, and those of the other do
    waited = place.command("wait", sweep, "--poll", "0.3")
    assert waited.code == 1 and "1 of 2 jobs of the sweep" in waited.err and "writes the report" in waited.out
    assert f"report: {place.home}/outputs/report/parts/index.html" in waited.out
    assert states(sweep, 0) == ["RUNNING", "INTERRUPTED", "RUNNING", "TRAINED", "RUNNING", "COMPLETED"]
    assert [event["id"] for event in events(sweep, 0)] == [training[0]] * 4 + [measuring[0]] * 2
    assert steps(sweep, 0) == list(range(1, 61))
    assert cluster.ask("squeue", "-h", "-r", "-j", f"{array},{measuring[0].partition('_')[0]}") == ""
    text = (place.home / "outputs/report/parts/index.html").read_text()
    assert "1 finished run," in text and "Sweeps under SLURM" in text


def test_a_launcher_that_dies_behind_sbatch_leaves_jobs_that_are_found_and_two_resubmits_make_one_array(
    cluster, place, tmp_path
):
    real = shutil.which("sbatch")
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\n{real} "$@"\nkill -9 $PPID\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    place_of_kill = Place(place.home, {**place.variables, "PATH": path})
    assert place_of_kill.sweep(SLURM, HELD, "name=found", "seed=5,6").code < 0
    (sweep,) = sweeps_of(place, "found")
    shown = place.command("status", sweep)
    assert rows(shown) == {0: "PENDING", 1: "PENDING"} and "found the jobs" in shown.out
    array = base(sweep)
    assert place.command("cancel", sweep).code == 0
    until(lambda: not cluster.ask("squeue", "-h", "-j", array))
    with place.popen("resubmit", sweep) as first, place.popen("resubmit", sweep) as two:
        outputs = [process.communicate(timeout=1800) for process in (first, two)]
    assert [first.returncode, two.returncode] == [0, 0], outputs
    assert sorted("nothing to resubmit" in out for out, _ in outputs) == [False, True]
    names = cluster.ask("squeue", "-h", "-r", "-o", "%j").split()
    assert sum(name.startswith("found-") for name in names) == 2
    assert place.command("cancel", sweep).code == 0


def sweeps_of(place: Place, name: str) -> list[Path]:
    sweeps = [path.parent for path in (place.home / "outputs/jobs").rglob("sweep.json")]
    return [sweep for sweep in sweeps if Sweep(sweep).job(0)["config"]["name"] == name]
