"""A sweep on disk: `sweep.json` says which jobs it has, how they were started, and under which ids.

Any shell can take it from there, on any day. Each job has a directory with `job.json`, what it is to do.
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
    """The sweep in `directory`; its jobs are known by their numbers."""

    directory: Path

    @classmethod
    def find(cls, directory: Path) -> "Sweep":
        """The sweep in `directory`.

        Raises:
            FileNotFoundError: if there is none.
        """
        if not (directory / "sweep.json").is_file():
            raise FileNotFoundError(
                f"{directory} holds no sweep (no sweep.json): give the directory that -m has named"
            )
        return cls(directory.resolve())

    def create(self, launcher: str, options: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Start the manifest, or leave it as it is where an earlier batch of the same sweep has."""
        if not (self.directory / "sweep.json").exists():
            asked = {"launcher": launcher, "options": dict(options), "overrides": list(overrides)}
            self._write(asked | {"jobs": {}, "submissions": []})

    def add_job(self, number: int, job: Mapping[str, Any]) -> None:
        """Write down what job `number` is to do."""
        directory = Path(job["directory"])
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "job.json", json.dumps(job, indent=2) + "\n", PRIVATE)

    def list_jobs(self, directories: Mapping[int, str]) -> None:
        """Note which jobs there are, and where; mutates the manifest."""
        manifest = self.manifest()
        known = {str(number): directory for number, directory in directories.items()}
        self._write(manifest | {"jobs": manifest["jobs"] | known})

    def add_submission(self, code: Path, ids: Mapping[int, str], **more: Any) -> None:
        """Note that jobs were started, under which ids and on which code; mutates the manifest."""
        manifest = self.manifest()
        submission = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "code": code.name,
            "ids": {str(number): one for number, one in ids.items()},
            **more,
        }
        self._write(manifest | {"submissions": [*manifest["submissions"], submission]})

    def manifest(self) -> dict[str, Any]:
        """What sweep.json says: `launcher options overrides jobs submissions`."""
        return json.loads((self.directory / "sweep.json").read_text())

    def jobs(self) -> dict[int, Path]:
        """The jobs' directories by number."""
        return {int(number): Path(place) for number, place in self.manifest()["jobs"].items()}

    def job(self, number: int) -> dict[str, Any]:
        """What a job is to do."""
        return json.loads((self.jobs()[number] / "job.json").read_text())

    def ids(self) -> dict[int, str]:
        """The id of each job that was ever started, of its last start."""
        return {
            int(number): one
            for submission in self.manifest()["submissions"]
            for number, one in submission["ids"].items()
        }

    def code(self) -> Path:
        """The copy of the code that the last jobs were started on."""
        return self.directory / self.manifest()["submissions"][-1]["code"]

    def lock(self) -> FileLock:
        """Held by whoever ends the sweep or starts jobs of it again."""
        return FileLock(self.directory / "sweep.lock")

    def _write(self, manifest: Mapping[str, Any]) -> None:
        write_atomically(self.directory / "sweep.json", json.dumps(manifest, indent=2) + "\n", PRIVATE)
