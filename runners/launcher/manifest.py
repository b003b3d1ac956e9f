"""A sweep on disk: `sweep.json` lists its jobs, its launcher's options and the ids of its submissions.

The files suffice to reattach from any shell. Each job has a directory with its description, `job.json`.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from runners.disk import write_atomically

PRIVATE = 0o600  # a tracking URI or a setup line may hold a password


@dataclass(frozen=True)
class Sweep:
    """The sweep in `directory`; its jobs are numbered."""

    directory: Path

    @classmethod
    def find(cls, directory: Path) -> "Sweep":
        """The sweep in `directory`.

        Raises:
            FileNotFoundError: if there is none.
        """
        if not (directory / "sweep.json").is_file():
            raise FileNotFoundError(
                f"{directory} holds no sweep (no sweep.json): give the directory that run.py -m printed last,"
                " after `sweep:`"
            )
        return cls(directory.resolve())

    def create(self, launcher: str, options: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Create the manifest, unless an earlier batch of the same sweep has done so."""
        if not (self.directory / "sweep.json").exists():
            settings = {"launcher": launcher, "options": dict(options), "overrides": list(overrides)}
            self._write(settings | {"jobs": {}, "submissions": []})

    def add_job(self, number: int, job: Mapping[str, Any]) -> None:
        """Write the description of job `number`."""
        directory = Path(job["directory"])
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "job.json", json.dumps(job, indent=2) + "\n", PRIVATE)

    def list_jobs(self, directories: Mapping[int, str]) -> None:
        """Add jobs and their directories; mutates the manifest."""
        manifest = self.manifest()
        added = {str(number): directory for number, directory in directories.items()}
        self._write(manifest | {"jobs": manifest["jobs"] | added})

    def add_submission(self, code: Path, ids: Mapping[int, str], **more: Any) -> None:
        """Add a submission: the ids of its jobs and the copy of the code; mutates the manifest."""
        manifest = self.manifest()
        submission = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "code": code.name,
            "ids": {str(number): id for number, id in ids.items()},
            **more,
        }
        self._write(manifest | {"submissions": [*manifest["submissions"], submission]})

    def manifest(self) -> dict[str, Any]:
        """The content of sweep.json: `launcher options overrides jobs submissions`."""
        return json.loads((self.directory / "sweep.json").read_text())

    def jobs(self) -> dict[int, Path]:
        """The jobs' directories by number."""
        return {int(number): Path(directory) for number, directory in self.manifest()["jobs"].items()}

    def job(self, number: int) -> dict[str, Any]:
        """The description of a job: the content of its job.json."""
        return json.loads((self.jobs()[number] / "job.json").read_text())

    def ids(self) -> dict[int, str]:
        """The latest id of each job that was ever submitted."""
        return {
            int(number): id
            for submission in self.manifest()["submissions"]
            for number, id in submission["ids"].items()
        }

    def code(self) -> Path:
        """The copy of the code of the latest submission."""
        return self.directory / self.manifest()["submissions"][-1]["code"]

    def lock(self) -> FileLock:
        """The lock held while a process ends the sweep or resubmits its jobs."""
        return FileLock(self.directory / "sweep.lock")

    def _write(self, manifest: Mapping[str, Any]) -> None:
        write_atomically(self.directory / "sweep.json", json.dumps(manifest, indent=2) + "\n", PRIVATE)
