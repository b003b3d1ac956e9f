"""A real SLURM on this machine, started and stopped by the project's own script."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app import ROOT
from sweeps import Place

SCRIPT = ROOT / "tests/helpers/slurm-local"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd", "sacct")
INSTALL = (
    "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core"
)


@dataclass(frozen=True)
class Cluster:
    """The cluster whose files are in `directory`."""

    directory: Path

    @property
    def variables(self) -> dict[str, str]:
        return {
            "SLURM_CONF": f"{self.directory}/etc/slurm.conf",
            "LOCAL_SLURM_DIR": str(self.directory),
            "LOCAL_SLURM_PORT": str(18200 + os.getpid() % 500 * 20),
            "LOCAL_SLURM_GPUS": "2",
            "LOCAL_SLURM_WAIT": "120",
            "LOCAL_SLURM_GRACE": "5",
        }

    def at(self, home: Path) -> Place:
        """Where sweeps are started on this cluster."""
        home.mkdir(parents=True, exist_ok=True)
        return Place(home, {"SLURM_CONF": self.variables["SLURM_CONF"]})

    def script(self, *arguments: str) -> None:
        subprocess.run(
            [str(SCRIPT), *arguments], env={**os.environ, **self.variables}, check=True, timeout=180
        )

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        variables = {**os.environ, **self.variables}
        asked = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd=cwd)
        assert asked.returncode == 0, asked.stderr
        return asked.stdout

    def accounted(self, sweep: Path) -> list[str]:
        """State and exit code of every job of a sweep, as sacct has them."""
        shown = self.ask("sacct", "-n", "-P", "-X", "-j", base(sweep), "-o", "JobID,State,ExitCode")
        return sorted(re.sub(r" by \d+", "", line) for line in shown.splitlines())

    def restarts(self, sweep: Path) -> int:
        shown = self.ask("scontrol", "show", "job", base(sweep))
        return int(re.findall(r"Restarts=(\d+)", shown)[0])

    def running(self, sweep: Path) -> int:
        return self.ask("squeue", "-h", "-r", "-t", "R", "-j", base(sweep)).count("\n")


def base(sweep: Path) -> str:
    """The id of a sweep's last array, or of its only job."""
    first = max((sweep / "slurm").glob("*_submission.sh"), key=lambda path: path.stat().st_mtime)
    return first.name.partition("_")[0]


@contextmanager
def cluster_in(directory: Path) -> Iterator[Cluster]:
    made = Cluster(directory)
    made.script("up")
    try:
        yield made
    finally:
        made.script("down")


def missing() -> list[str]:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]
