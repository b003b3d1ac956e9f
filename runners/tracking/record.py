"""The record of a run on disk: the primary data, of which MLflow is an index.

`run.json` describes the run, `metrics.jsonl` holds its metrics, `status.json` its status, and
`artifacts/` its files. All of them are readable at any moment, however the run ended.
"""

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import time_ns
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypedDict

from runners.disk import full_disk_explained, time_at, write_atomically
from runners.signals import Status, process_start, status_after
from runners.tracking.redaction import one_line, redacted, redacted_text

log = logging.getLogger(__name__)
DESCRIBED = {name: str for name in ("id", "experiment", "name", "kind", "tracking_uri")}
DESCRIBED |= {"params": dict, "tags": dict, "inputs": list, "parent": str | None, "start_time": int}
ENDED = {"status": str, "end_time": int | None, "pid": int, "host": str, "error": str | None}


class Input(TypedDict):
    """A data set that a run read: its name, digest, source and purpose (`context`)."""

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
    """A run's record in `directory`; as a context manager it records the end of the run.

    A normal end is FINISHED; Ctrl-C and SIGTERM (see `terminations_as_exceptions`) are KILLED;
    Interrupted is SCHEDULED, a pause rather than an end; any other exception is FAILED.
    """

    directory: Path
    # Of this attempt at a run, by `create`; other readers and writers of the record have none.
    writer: str | None = field(default=None, repr=False)
    # The points logged by earlier attempts of this run, as (key, value, step) in JSON.
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
        """Start a record, or continue the one in `directory` (of a job that was requeued).

        A sweep, unlike a run, may outlive its process; the process that observes its end calls `end`.
        `parent` is the directory of a sweep's record. Secrets are masked before they are written.

        A run has one writer: the record that is made last refuses the points of those before it.

        Raises:
            ValueError: if `directory` holds the record of another run.
        """
        directory.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {
            "experiment": redacted_text(experiment),
            "name": redacted_text(name),
            "params": _as_text(params),
        }
        old = {}
        if (directory / "run.json").exists():
            old = cls(directory).description()
            if different := [key for key in settings if settings[key] != old[key]]:
                raise ValueError(
                    f"{directory} holds the record of another run ({', '.join(different)} differ): "
                    "choose another directory"
                )
        writer = uuid.uuid4().hex if kind == "run" else None
        starting = cls(directory, writer)
        starting._write_status("RUNNING", None, None)  # before run.json, which is never without a status
        # After the status: an earlier attempt that is still alive now refuses to add points.
        record = replace(starting, earlier=_earlier_points(directory / "metrics.jsonl")) if old else starting
        description = settings | {
            "id": old.get("id", uuid.uuid4().hex),
            "kind": kind,
            "parent": None if parent is None else os.path.relpath(parent, directory),
            "tracking_uri": redacted_text(tracking_uri),
            "start_time": old.get("start_time", _now(directory)),
            "tags": old.get("tags", {}),
            "inputs": old.get("inputs", []),
        }
        record._describe(description, tags, inputs)
        return record

    def log(self, metrics: Mapping[str, float], step: int, time: int | None = None) -> None:
        """Append one value per metric, at `time` in ms since 1970 (default: now).

        A resumed run skips points that an earlier attempt logged with the same value and step.

        Raises:
            PermissionError: if a later attempt writes the record now, or another process has ended it.
        """
        self._check_writer()
        moment = time_ns() // 1_000_000 if time is None else time
        lines = ""
        for key, value in metrics.items():
            point = Point(key, float(value), int(step), moment)
            if _identity(point) not in self.earlier:
                lines += json.dumps(point._asdict()) + "\n"
        # One write of whole lines, so that a kill or a full disk truncates at most the last one.
        with full_disk_explained(self.directory), self._metrics.open("ab") as file:
            file.write(lines.encode())

    def artifact(self, relative_path: str) -> Path:
        """The path for an artifact, with its parent directories made.

        Raises:
            ValueError: if `relative_path` leads outside the record.
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
        """Add tags and inputs; mutates run.json."""
        self._check_writer()
        self._describe(self.description(), tags, inputs)

    def end(self, status: Status, error: str | None = None, end_time: int | None = None) -> None:
        """Record the end of the run, `end_time` in ms since 1970 (default: now).

        Raises:
            PermissionError: if a later attempt writes the record now, or another process has ended it.
        """
        self._check_writer()
        self._write_status(status, error, _now(self.directory) if end_time is None else end_time)

    def pause(self) -> None:
        """Leave the run to a later attempt: its status is SCHEDULED, also after a normal end of the block.

        Raises:
            PermissionError: as `end`.
        """
        self._check_writer()
        self._write_status("SCHEDULED", None, None)

    def described(self) -> bool:
        """Whether the record has been made: a kill may have left a part of one."""
        return (self.directory / "run.json").exists()

    def description(self) -> dict[str, Any]:
        """The content of run.json: `id experiment name kind params tags inputs parent` and others.

        Raises:
            ValueError: if it is damaged.
        """
        return _read(self.directory / "run.json", DESCRIBED)

    def status(self) -> dict[str, Any]:
        """The content of status.json: `status end_time pid process_start host writer error`.

        Raises:
            ValueError: if it is damaged.
        """
        return _read(self.directory / "status.json", ENDED)

    def parent(self) -> "Record | None":
        """The record of the sweep that this run belongs to."""
        relative = self.description()["parent"]
        return None if relative is None else Record((self.directory / relative).resolve())

    def died(self) -> bool:
        """Whether the status is RUNNING although the run's process on this host is gone."""
        status = self.status()
        return (
            status["status"] == "RUNNING"
            and self.description()["kind"] == "run"
            and status["host"] == socket.gethostname()
            and process_start(status["pid"]) != status["process_start"]
        )

    def last_sign_of_life(self) -> int:
        """The time of the run's last write to the record, in ms since 1970."""
        paths = [self._metrics, self.directory / "status.json"]
        return max(path.stat().st_mtime_ns for path in paths if path.exists()) // 1_000_000

    def last_point(self) -> Point | None:
        """The last logged point, None if there is none."""
        last = None
        for points, _ in self.batches(0, 1000):
            last = points[-1] if points else last
        return last

    def batches(self, offset: int, size: int) -> Iterator[tuple[list[Point], int]]:
        """Points from byte `offset` of metrics.jsonl, `size` at a time, each batch with the offset after it.

        A last line without a newline is still being written and left out; damaged lines are skipped.
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
                with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    point = json.loads(line)
                    number, step, time = float(point["value"]), int(point["step"]), int(point["time"])
                    points.append(Point(str(point["key"]), number, step, time))
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
            paused = self.status()["status"] == "SCHEDULED" and self.status()["writer"] == self.writer
            return None if paused else self.end("FINISHED")
        try:
            self._check_writer()
            status = status_after(error)
            if status == "SCHEDULED":
                self._write_status(status, None, None)
            else:
                self.end(status, one_line(error))
        except OSError:  # raising it would hide `error`
            log.exception("could not record the end of the run in %s", self.directory)

    def _check_writer(self) -> None:
        if self.writer is None:
            return
        status = self.status()
        if status.get("writer") != self.writer:
            raise PermissionError(
                f"{self.directory} is no longer this attempt's: process {status['pid']} on {status['host']}"
                f" {'writes' if status['status'] == 'RUNNING' else 'has ended'} it; this attempt ends"
            )

    @property
    def _metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def _describe(
        self, description: dict[str, Any], tags: Mapping[str, object], inputs: Sequence[Input]
    ) -> None:
        known = description["inputs"]
        new = [item for item in map(_as_text, inputs) if item not in known]
        description |= {"tags": description["tags"] | _as_text(tags), "inputs": known + new}
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
                "writer": self.writer,
                "error": None if error is None else redacted_text(error),
            }
        )
        try:
            write_atomically(path, content)
        except OSError:
            if not path.exists():
                raise
            # A full disk has no room for a second file, but the existing one already has its block.
            with path.open("r+") as file:
                file.write(content)
                file.truncate()


def _earlier_points(path: Path) -> frozenset[str]:
    if not path.exists():
        return frozenset()
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)  # drops a torn last line, which would damage the next
    batches = Record(path.parent).batches(0, 1000)
    return frozenset(_identity(point) for points, _ in batches for point in points)


def _read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        missing = [key for key in kinds if key not in content]
        if not isinstance(content, dict) or missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        wrong = [key for key, kind in kinds.items() if not isinstance(content[key], kind)]
        if wrong:
            raise ValueError(f"its {wrong[0]} is a {type(content[wrong[0]]).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): bring it back from a copy, or delete {path.parent} and run again"
        ) from error
    return content


def _identity(point: Point) -> str:
    return json.dumps([point.key, point.value, point.step])  # as text, so that NaN equals NaN


def _as_text(items: Mapping[str, object]) -> dict[str, str]:
    masked = redacted(items)
    assert isinstance(masked, dict)
    return {str(key): redacted_text(str(value)) for key, value in masked.items()}


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _now(directory: Path) -> int:
    try:
        return round(1000 * time_at(directory))
    except OSError:  # a full disk has no room for another file
        return time_ns() // 1_000_000
