"""The processor time that short jobs cost beyond their runs, packed into one task and on this machine.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/packed.py DIRECTORY [JOBS] [packed|local]

Starts a sweep of JOBS tiny runs in both ways or the given one: in one task with `jobs_per_task`, where
stand-ins for sbatch and srun run the task here, and by the local launcher. All processes of the sweep count,
down to their children. A run itself is measured in a process that has imported everything. The target is 3 s
beyond the run.
"""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from commands import RUN, environment
from kills import SMALL

TINY = [
    *(override for override in SMALL if not override.startswith("probe.")),
    "training.steps=2",
    "probe=[]",
]
SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER: detached processes become children of this one
STANDS = {
    "sbatch": (
        'cp "$2" "$0.script"; echo 1\n'
        'SLURM_JOB_ID=1 SLURMD_NODENAME=here setsid bash "$0.script" > "$0.log" 2>&1 &'
    ),
    "srun": 'while [ "$1" != sh ]; do shift; done; exec "$@"',
    **dict.fromkeys(("squeue", "sacct", "scontrol"), "true"),
}
ALONE = """
import json, sys, time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
job, modules, outputs = sys.argv[1:]
for name in json.loads(Path(modules).read_text()):
    with suppress(Exception):
        import_module(name)
from runners.compose import experiment
described = json.loads(Path(job).read_text())
described["config"]["outputs"] = described["outputs"] = outputs
began = time.process_time()
experiment(described | {"directory": outputs + "/alone", "parent": None}).run()
print("took", time.process_time() - began)
"""


def used() -> float:
    """Processor time of all children that have ended, in seconds."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def swept(home: Path, jobs: int, options: list[str], variables: dict[str, str]) -> tuple[Path, float]:
    """The directory of a sweep and its processor time without that of the launcher."""
    command = [*RUN, *TINY, f"seed=range({jobs})", *options]
    began = used()
    subprocess.run(
        [*command, "hydra.launcher.detach=true", "-m"], cwd=home, env=variables, check=True, stdout=-3
    )
    launched, after = used() - began, used()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    (path,) = home.glob("outputs/jobs/*/*/sweep.json")
    logs = [(path.parent / str(number) / "events.jsonl").read_text() for number in range(jobs)]
    ends = [json.loads(log.splitlines()[-1]) for log in logs]
    assert all(end["state"] == "COMPLETED" for end in ends), ends
    each = [end.get("processor_seconds", 0.0) for end in ends]
    print(f"  launched in {launched:.1f} s; the jobs' own processes took {each} s", flush=True)
    return path.parent, used() - after


def main(directory: Path, jobs: int, kinds: Sequence[str]) -> None:
    """Print the processor time of a job in these ways, and that of a run alone."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    (directory / "bin").mkdir(parents=True)
    for name, script in STANDS.items():
        (directory / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (directory / "bin" / name).chmod(0o755)
    variables = environment() | {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
    base = directory / "base"
    base.mkdir()
    subprocess.run(
        [*RUN, *TINY, "seed=1000"],
        cwd=base, env=variables, check=True, stdout=-3,
    )  # fmt: skip
    options = {
        "packed": ["hydra/launcher=slurm", f"hydra.launcher.jobs_per_task={jobs}"],
        "local": ["hydra.launcher.array_parallelism=1"],
    }
    sweep = directory
    for kind in kinds:
        home = directory / kind
        shutil.copytree(base / "outputs/pretraining", home / "outputs/pretraining")
        began = time.monotonic()
        sweep, seconds = swept(home, jobs, options[kind], variables)
        print(f"{kind}: {seconds / jobs:.2f} s of processor time a job", flush=True)
        print(f"  {time.monotonic() - began:.0f} s for {jobs} jobs", flush=True)
    outputs = directory / "alone"
    shutil.copytree(base / "outputs/pretraining", outputs / "pretraining")
    modules = sweep / "modules.json"
    alone = subprocess.check_output(
        [sys.executable, "-c", ALONE, str(sweep / "0/job.json"), str(modules), str(outputs)],
        cwd=directory, env=variables, text=True,
    )  # fmt: skip
    print(f"a run itself: {float(alone.rpartition('took ')[2]):.2f} s")


if __name__ == "__main__":
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    main(Path(sys.argv[1]).resolve(), jobs, sys.argv[3:] or ["packed", "local"])
