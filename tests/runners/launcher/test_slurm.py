"""Submissions to SLURM, with stand-ins for its commands; tests/slurm uses a real SLURM."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runners.launcher.jobs import GO_ON
from runners.launcher.slurm import SlurmOptions, ids_of, submit_array

Stands = Callable[[str, str], None]


@pytest.fixture
def stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stands:
    """Puts a shell script in the place of a command of SLURM's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("runners.launcher.slurm.AGAIN_AFTER", (0.0, 0.0))

    def stand(command: str, script: str) -> None:
        (folder / command).write_text(f"#!/bin/sh\n{script}\n")
        (folder / command).chmod(0o755)

    for command in ("squeue", "sacct"):
        stand(command, "true")
    return stand


def test_options_are_sbatchs_with_requeue_and_take_numbers_and_lists():
    options = SlurmOptions(
        mem_gb=1.5,
        partition="gpu",
        timeout_min=1,
        additional_parameters={"hold": True, "licenses": ["a", "b"]},
    )
    assert options.parameters() == {
        "mem": "1536MB",
        "partition": "gpu",
        "nodes": 1,
        "requeue": True,
        "hold": True,
        "licenses": ["a", "b"],
    }
    plain = SlurmOptions(mem_per_cpu=600, account=12345, exclude=["n1", "n2"])  # pyright: ignore
    assert (plain.mem_per_cpu, plain.account, plain.exclude) == ("600", "12345", "n1,n2")
    assert SlurmOptions(dependency="singleton").depending("afterok:7").dependency == "singleton,afterok:7"
    several = SlurmOptions(nodes=2, tasks_per_node=4, gpus_per_node=4, measure={}, report_job={})
    assert several.tasks == 8 and several.parameters()["ntasks_per_node"] == 4
    assert several.measuring().tasks == several.reporting().tasks == 1
    with pytest.raises(ValueError, match=r"run one in 2: set only one"):
        SlurmOptions(tasks_per_node=2, jobs_per_task=3)
    with pytest.raises(ValueError, match=r"set hydra.launcher.gpus_per_node=2"):
        SlurmOptions(tasks_per_node=2, gpus_per_node=1)
    with pytest.raises(ValidationError):
        SlurmOptions(mem_gb="much")  # pyright: ignore[reportArgumentType]


def test_a_submission_is_a_script_named_by_its_array_with_everything_quoted(tmp_path, stands_for):
    stands_for("sbatch", 'cp "$2" "$2.seen"; env | grep -c "^SBATCH_" > "$2.count"; echo "7;cluster"')
    folder = tmp_path / "a sweep of 50%" / "slurm"
    options = SlurmOptions(
        cpus_per_task=3,
        comment="it's mine",
        setup=["module load x"],
        srun_args=["-l"],
        timeout_min=1,
        additional_parameters={"hold": True, "spread_job": False, "licenses": ["a", "b"]},
    )
    assert submit_array("dpo-1", 3, options, folder, Path("/co de"), "a.module") == "7"
    script = (folder / "7_submission.sh").read_text()
    lines = script.splitlines()
    assert "#SBATCH --array=0-2%3" in lines and "#SBATCH --job-name=dpo-1" in lines
    assert """#SBATCH --comment='it'"'"'s mine'""" in lines and "#SBATCH --requeue" in lines
    logs = f"{tmp_path}/a sweep of 50%%/slurm/%A_%a"
    assert f"#SBATCH --output='{logs}_0_log.out'" in lines
    # Half of the limit, where the default of 120 s would be all of it.
    assert {"#SBATCH --signal=USR2@30", "#SBATCH --time=1", "#SBATCH --open-mode=append"} <= set(lines)
    assert {"#SBATCH --hold", "#SBATCH --licenses=a,b", "#SBATCH --cpus-per-task=3"} <= set(lines)
    assert "spread-job" not in script and "submitit=" not in script and "wckey" not in script
    (command,) = [line for line in lines if line.startswith("srun ")]
    step = shlex.split(command)
    assert step[:6] == ["srun", "--unbuffered", "--output", f"{logs}_%t_log.out", "-l", "--cpus-per-task=3"]
    assert step[-4:] == ["-m", "a.module", str(folder.parent), "dpo-1"]
    assert lines.index("module load x") < lines.index(command)
    assert ids_of("7", [[4], [5], [6]]) == {4: "7_0", 5: "7_1", 6: "7_2"} and ids_of("7", [[4]]) == {4: "7"}


def test_second_jobs_have_options_of_their_own_and_no_gpu_for_the_report():
    given: Any = {"partition": "gpu", "gpus_per_node": 4, "mem_gb": 64, "exclude": "n1", "mail_type": "END"}
    options = SlurmOptions(
        **given,
        measure={"partition": "cpu", "gpus_per_node": None, "timeout_min": 5},
        report_job={"mem_gb": 4},
    )
    measuring, reporting = options.measuring(), options.reporting()
    assert (measuring.partition, measuring.gpus_per_node, measuring.exclude) == ("cpu", None, "n1")
    assert measuring.limits()["timeout_min"] == 5 and options.limits()["timeout_min"] == 60
    assert (reporting.partition, reporting.gpus_per_node, reporting.mem_gb) == ("gpu", None, 4)
    follows = measuring.after_each("7", 3).parameters()
    assert follows["dependency"] == "aftercorr:7" and follows["kill_on_invalid_dep"] == "yes"
    assert measuring.after_each("7", 1).dependency == "afterok:7"
    assert "mail_type" not in options.unmailed().parameters()
    with pytest.raises(ValueError, match=r"measure.after is an option of the whole sweep"):
        SlurmOptions(measure={"after": "x"})
    with pytest.raises(ValueError, match="measure and jobs_per_task exclude each other"):
        SlurmOptions(measure={}, jobs_per_task=2)
    with pytest.raises(ValueError, match=r"report_job\.mem_gb should be a valid number, got 'much'"):
        SlurmOptions(report_job={"mem_gb": "much"})
    with pytest.raises(ValueError, match=r"measure\.gpus "):
        SlurmOptions(measure={"gpus": 1})


def test_in_a_container_jobs_have_its_python_and_the_script_requeues_them(tmp_path, stands_for):
    stands_for("sbatch", "echo 7")
    stands_for("scontrol", f'echo "$*" >> {tmp_path}/requeued')
    stands_for("srun", f'echo "$WEIGHTGEOM_REQUEUED_BY_SCRIPT" > {tmp_path}/set; exit "$CODE"')
    options = SlurmOptions(container="/images/lab one.sif", container_args=["--nv"])
    places = [str(tmp_path / "outputs"), str(tmp_path)]
    submit_array("dpo-1", 2, options, tmp_path / "s/slurm", tmp_path / "code", "m", places)
    script = tmp_path / "s/slurm/7_submission.sh"
    (command,) = [line for line in script.read_text().splitlines() if line.startswith("srun ")]
    words = shlex.split(command)
    binds = [f"--bind={place}" for place in (tmp_path / "s", *places)]
    start = words.index("apptainer")
    assert words[start:][:7] == ["apptainer", "exec", *binds, "--nv", "/images/lab one.sif"]
    assert words[start + 7] == "env" and words[-6:-3] == ["python3", "-u", "-m"]

    def ends(code: int) -> int:
        variables = {**os.environ, "CODE": str(code), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
        return subprocess.run(["bash", str(script)], env=variables).returncode

    assert [ends(0), ends(1)] == [0, 1] and not (tmp_path / "requeued").exists()
    assert ends(GO_ON) == GO_ON and (tmp_path / "requeued").read_text() == "requeue 7_1\n"
    assert (tmp_path / "set").read_text() == "1\n"
    options = SlurmOptions(
        container="lab", container_runtime="pyxis", container_args=["--container-writable"]
    )
    submit_array("dpo-2", 1, options, tmp_path / "s/slurm", tmp_path / "code", "m", places)
    (command,) = [line for line in script.read_text().splitlines() if line.startswith("srun ")]
    words = shlex.split(command)
    mounts = ",".join(f"{place}:{place}" for place in (tmp_path / "s", *places))
    assert words[4:7] == ["--container-image=lab", f"--container-mounts={mounts}", "--container-writable"]
    assert words[7] == "sh" and "apptainer" not in words


def test_jobs_that_slurm_took_although_sbatch_failed_are_found_by_their_name(tmp_path, stands_for):
    stands_for("sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
    stands_for("squeue", "echo '9|dpo-1'")
    assert submit_array("dpo-1", 2, SlurmOptions(), tmp_path / "slurm", tmp_path, "m") == "9"
    assert (tmp_path / "slurm/9_submission.sh").exists()
    stands_for("squeue", "true")
    with pytest.raises(ConnectionError, match="not known whether SLURM took the jobs: Socket timed out"):
        submit_array("dpo-2", 2, SlurmOptions(), tmp_path / "slurm", tmp_path, "m")
    stands_for("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(ValueError, match="SLURM refuses the jobs: invalid partition specified: x"):
        submit_array("dpo-3", 2, SlurmOptions(), tmp_path / "slurm", tmp_path, "m")
