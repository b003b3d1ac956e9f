"""A sweep on disk: `sweep.json` lists its jobs, its launcher's options and the ids of its submissions.

The files suffice to reattach from any shell. Each job has a directory with its description, `job.json`. A
submission to SLURM is listed before it is made, with its unique name; its ids follow.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.disk import read_object, write_atomically
from runners.launcher.ownership import held

PRIVATE = 0o600  # a tracking URI or a setup line may hold a password
KINDS = {"launcher": str, "options": dict, "overrides": list, "jobs": dict, "submissions": list}
JOB = {name: str for name in ("directory", "run_name", "tracking_uri")}
JOB |= {"overrides": list, "config": dict, "limits": dict}
SUBMISSION = {"time", "code", "ids"}


@dataclass(frozen=True)
class Sweep:
    """The sweep in `directory`; its jobs are numbered."""

    directory: Path

    @classmethod
    def find(cls, directory: Path) -> "Sweep":
        """The sweep in `directory`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if its sweep.json is not a sweep's.
        """
        path, advice = directory / "sweep.json", "give the directory that run.py -m printed after `sweep:`"
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no sweep (no sweep.json): {advice}")
        manifest = read_object(path, advice)
        whole = all(isinstance(manifest.get(key), kind) for key, kind in KINDS.items())
        if not whole or not all(isinstance(override, str) for override in manifest["overrides"]):
            raise ValueError(f"{path} is not a sweep's: {advice}")
        if not manifest["jobs"]:
            raise ValueError(f"the sweep in {directory} was interrupted before it had jobs: start it again")
        sweep = cls(directory.resolve())
        try:
            directories, _ = sweep.jobs(), sweep.ids()
            parts = [SUBMISSION <= submission.keys() for submission in manifest["submissions"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a sweep's: {advice}") from error
        if not all(parts):
            raise ValueError(f"{path} is not a sweep's: {advice}")
        for number, place in directories.items():
            if not (place / "job.json").is_file():
                raise ValueError(
                    f"the sweep in {directory} has no {place / 'job.json'}, which describes job {number}:"
                    " bring the directory back to where it was, or start the sweep again"
                )
        return sweep

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

    def add_submission(self, code: Path, **more: Any) -> int:
        """Add a submission that runs the copy `code` of the code; mutates the manifest, returns its place."""
        manifest = self.manifest()
        submission = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), "code": code.name, "ids": {}, **more}
        self._write(manifest | {"submissions": [*manifest["submissions"], submission]})
        return len(manifest["submissions"])

    def amend_submission(self, place: int, **more: Any) -> None:
        """Change entries of a submission, such as the `ids` of its jobs by number; mutates the manifest."""
        manifest = self.manifest()
        manifest["submissions"][place] |= more
        self._write(manifest)

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Change the launcher's options of further submissions; mutates the manifest."""
        self._write(self.manifest() | {"options": dict(options)})

    def set_report_job(self, name: str, id: str) -> None:
        """Note the job that ends the sweep, before and after its submission; mutates the manifest."""
        self._write(self.manifest() | {"report_job": {"name": name, "id": id}})

    def manifest(self) -> dict[str, Any]:
        """The content of sweep.json: `launcher options overrides jobs submissions`, `report_job` if any."""
        return read_object(
            self.directory / "sweep.json", "bring it back from a copy, or start the sweep again"
        )

    def jobs(self) -> dict[int, Path]:
        """The jobs' directories by number."""
        return {int(number): Path(directory) for number, directory in self.manifest()["jobs"].items()}

    def job(self, number: int) -> dict[str, Any]:
        """The description of a job: the content of its job.json."""
        path, advice = self.jobs()[number] / "job.json", "bring it back from a copy, or start the sweep again"
        job = read_object(path, advice)
        wrong = [key for key, kind in JOB.items() if not isinstance(job.get(key), kind)]
        if not wrong and not isinstance(job["config"].get("name"), str):
            wrong = ["config.name"]
        if not wrong and not all(isinstance(override, str) for override in job["overrides"]):
            wrong = ["overrides"]
        if wrong:
            raise ValueError(f"{path} is damaged (it has no {wrong[0]} of a job's): {advice}")
        return job

    def ids(self) -> dict[int, str]:
        """The latest id of each job that was ever submitted."""
        return {
            int(number): id
            for submission in self.manifest()["submissions"]
            for number, id in submission["ids"].items()
        }

    def training_ids(self) -> dict[int, str]:
        """The latest id of the training of each job whose measurements are another job's."""
        ids: dict[int, str] = {}
        for submission in self.manifest()["submissions"]:
            for number, id in submission["ids"].items():
                if submission.get("part") == "training":
                    ids[int(number)] = id
                elif submission.get("part") is None:
                    ids.pop(int(number), None)
        return ids

    def every_id(self) -> list[str]:
        """The ids of all submissions."""
        submissions = self.manifest()["submissions"]
        return list(dict.fromkeys(id for submission in submissions for id in submission["ids"].values()))

    def code(self) -> Path:
        """The copy of the code of the latest submission."""
        return self.directory / self.manifest()["submissions"][-1]["code"]

    def lock(self) -> AbstractContextManager[None]:
        """The lock held while a process decides about the sweep's jobs, and while it ends the sweep."""
        return held(self.directory / "sweep.lock")

    def _write(self, manifest: Mapping[str, Any]) -> None:
        write_atomically(self.directory / "sweep.json", json.dumps(manifest, indent=2) + "\n", PRIVATE)
