"""Submissions to SLURM, with stand-ins for its commands; tests/slurm uses a real SLURM."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

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
    with pytest.raises(ValueError, match="a run is one process"):
        SlurmOptions(tasks_per_node=2)
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
