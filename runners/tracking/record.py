"""The record of a run on disk: the truth, of which MLflow is an index.

`run.json` what was asked for, `metrics.jsonl` what was measured so far, `status.json` how it
stands, `artifacts/` what it made. Everything is readable at any moment, after any kind of end.
"""

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import time_ns
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypedDict

from runners.disk import full_disk_explained, write_atomically
from runners.signals import Status, process_start, status_after
from runners.tracking.redaction import one_line, redacted, redacted_text

log = logging.getLogger(__name__)


class Input(TypedDict):
    """A data set that a run read: its fingerprint, where it came from and what it was read for."""

    name: str
    digest: str
    source: str
    context: str


class Point(NamedTuple):
    """One measured value; `time` in ms since 1970."""

    key: str
    value: float
    step: int
    time: int


@dataclass(frozen=True)
class Record:
    """A run's record in `directory`; as a context manager it notes how the run ended.

    A normal end is FINISHED; Ctrl-C and SIGTERM (see `terminations_as_exceptions`) are KILLED;
    Interrupted is SCHEDULED, no end but a pause; any other exception is FAILED.
    """

    directory: Path
    # The rows that an earlier attempt of this run wrote, as (key, value, step) in JSON.
    earlier: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        experiment: str,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, object],
        inputs: Sequence[Input],
        tracking_uri: str,
        parent: Path | None = None,
        kind: Literal["run", "sweep"] = "run",
    ) -> "Record":
        """Start a record, or continue the one that `directory` holds (a job that was requeued).

        A sweep, unlike a run, may outlive its process: whoever sees its end calls `end`.
        `parent` is the directory of a sweep's record. Secrets are masked before they are written.

        Raises:
            ValueError: if `directory` holds the record of another run.
        """
        directory.mkdir(parents=True, exist_ok=True)
        asked: dict[str, Any] = {
            "experiment": redacted_text(experiment),
            "name": redacted_text(name),
            "params": _texts(params),
        }
        old = {}
        if (directory / "run.json").exists():
            old = cls(directory).description()
            if different := [key for key in asked if asked[key] != old[key]]:
                raise ValueError(
                    f"{directory} holds the record of another run ({', '.join(different)} differ); "
                    "choose another directory"
                )
        record = cls(directory, _rows(directory / "metrics.jsonl") if old else frozenset())
        record._write_status("RUNNING", None, None)  # first: run.json is never without a status
        description = asked | {
            "id": old.get("id", uuid.uuid4().hex),
            "kind": kind,
            "parent": None if parent is None else os.path.relpath(parent, directory),
            "tracking_uri": redacted_text(tracking_uri),
            "start_time": old.get("start_time", _now()),
            "tags": old.get("tags", {}),
            "inputs": old.get("inputs", []),
        }
        record._describe(description, tags, inputs)
        return record

    def log(self, metrics: Mapping[str, float], step: int, time: int | None = None) -> None:
        """Append one value per metric, at `time` in ms since 1970 (now, if left out).

        A continued run does not repeat what its earlier attempt logged with the same value.
        """
        moment = _now() if time is None else time
        lines = ""
        for key, value in metrics.items():
            point = Point(key, float(value), int(step), moment)
            if _identity(point) not in self.earlier:
                lines += json.dumps(point._asdict()) + "\n"
        # One write of whole lines: what a kill or a full disk tears is at most the last of them.
        with full_disk_explained(self.directory), self._metrics.open("ab") as file:
            file.write(lines.encode())

    def artifact(self, relative_path: str) -> Path:
        """Where to write an artifact, its parents made.

        Raises:
            ValueError: if `relative_path` leaves the record.
        """
        path = self.directory / "artifacts" / relative_path
        if not path.resolve().is_relative_to((self.directory / "artifacts").resolve()):
            raise ValueError(f"an artifact stays inside its record, got {relative_path!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def tag(self, key: str, value: object) -> None:
        """Set one tag; mutates run.json."""
        self.update(tags={key: value})

    def update(self, *, tags: Mapping[str, object] = {}, inputs: Sequence[Input] = ()) -> None:
        """Add tags and inputs that became known later; mutates run.json."""
        self._describe(self.description(), tags, inputs)

    def end(self, status: Status, error: str | None = None, end_time: int | None = None) -> None:
        """Note how the run ended, `end_time` in ms since 1970 (now, if left out)."""
        self._write_status(status, error, _now() if end_time is None else end_time)

    def description(self) -> dict[str, Any]:
        """What run.json says: `id experiment name kind params tags inputs parent` and so on."""
        return json.loads((self.directory / "run.json").read_text())

    def status(self) -> dict[str, Any]:
        """What status.json says: `status end_time pid host error`."""
        return json.loads((self.directory / "status.json").read_text())

    def parent(self) -> "Record | None":
        """The record of the sweep that this run belongs to."""
        relative = self.description()["parent"]
        return None if relative is None else Record((self.directory / relative).resolve())

    def died(self) -> bool:
        """Whether the record says RUNNING, but its process on this host is gone."""
        status = self.status()
        return (
            status["status"] == "RUNNING"
            and self.description()["kind"] == "run"
            and status["host"] == socket.gethostname()
            and process_start(status["pid"]) != status["process_start"]
        )

    def last_sign_of_life(self) -> int:
        """When the record was last written to by its run, in ms since 1970."""
        paths = [self._metrics, self.directory / "status.json"]
        return max(path.stat().st_mtime_ns for path in paths if path.exists()) // 1_000_000

    def last_point(self) -> Point | None:
        """What was logged last, if anything was."""
        last = None
        for points, _ in self.batches(0, 1000):
            last = points[-1] if points else last
        return last

    def batches(self, offset: int, size: int) -> Iterator[tuple[list[Point], int]]:
        """Points from byte `offset` of metrics.jsonl on, `size` at a time, with the offset after.

        A line without its end is not there yet; a damaged one is skipped.
        """
        if not self._metrics.exists():
            return
        points: list[Point] = []
        with self._metrics.open("rb") as file:
            file.seek(offset)
            start = offset
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                with suppress(ValueError, TypeError):
                    points.append(Point(**json.loads(line)))
                if len(points) == size:
                    yield points, offset
                    points, start = [], offset
        if offset > start:
            yield points, offset

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return self.end("FINISHED")
        try:
            status = status_after(error)
            if status == "SCHEDULED":
                self._write_status(status, None, None)
            else:
                self.end(status, one_line(error))
        except OSError:  # not to hide `error`
            log.exception("could not note in %s how the run ended", self.directory)

    @property
    def _metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def _describe(
        self, description: dict[str, Any], tags: Mapping[str, object], inputs: Sequence[Input]
    ) -> None:
        known = description["inputs"]
        new = [item for item in map(_texts, inputs) if item not in known]
        description |= {"tags": description["tags"] | _texts(tags), "inputs": known + new}
        write_atomically(self.directory / "run.json", _json(description))

    def _write_status(self, status: Status, error: str | None, end_time: int | None) -> None:
        path = self.directory / "status.json"
        content = _json(
            {
                "status": status,
                "end_time": end_time,
                "pid": os.getpid(),
                "process_start": process_start(os.getpid()),
                "host": socket.gethostname(),
                "error": None if error is None else redacted_text(error),
            }
        )
        try:
            write_atomically(path, content)
        except OSError:
            if not path.exists():
                raise
            # A full disk has no room for a second file, but the first one has its block already.
            with path.open("r+") as file:
                file.write(content)
                file.truncate()


def _rows(path: Path) -> frozenset[str]:
    if not path.exists():
        return frozenset()
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)  # a torn last line would spoil the next one
    batches = Record(path.parent).batches(0, 1000)
    return frozenset(_identity(point) for points, _ in batches for point in points)


def _identity(point: Point) -> str:
    return json.dumps([point.key, point.value, point.step])  # as text, so that NaN equals NaN


def _texts(items: Mapping[str, object]) -> dict[str, str]:
    masked = redacted(items)
    assert isinstance(masked, dict)
    return {str(key): redacted_text(str(value)) for key, value in masked.items()}


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _now() -> int:
    return time_ns() // 1_000_000
