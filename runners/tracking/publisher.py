"""Publishes records to MLflow during and after a run; the record is primary, and MLflow its index.

Publishing never raises into a run or delays it, and can be repeated: `published.json`, next to the record,
keeps track of everything that MLflow already has.
"""

import getpass
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from runners.disk import read_object, write_atomically
from runners.tracking.limits import (
    BATCH_BYTES,
    CONTEXT_LENGTH,
    DATASET_DIGEST_LENGTH,
    DATASET_NAME_LENGTH,
    DATASET_SOURCE_LENGTH,
    METRICS_PER_BATCH,
    PARAM_LENGTH,
    PARAMS_PER_BATCH,
    RUN_NAME_LENGTH,
    TAG_LENGTH,
    USER_LENGTH,
    fitted,
    key,
)
from runners.tracking.record import Point, Record
from runners.tracking.redaction import one_line, redacted_text
from runners.tracking.stores import LOCK_PATIENCE, check_tracking_uri, open_store, sync_command
from weightgeom.interruption import Interrupted

log = logging.getLogger(__name__)
SEAL = "sha256"  # of the other entries, in published.json


@dataclass(frozen=True)
class Published:
    """The parts of a record that MLflow already has; `described` and `artifacts` are digests."""

    tracking_uri: str
    experiment_id: str
    run_id: str
    offset: int = 0  # bytes of metrics.jsonl
    described: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "Published | None":
        """The content of `published.json`; None if there is none, or not the one that was written.

        A record without one is sent anew: what MLflow has already changes nothing there.
        """
        try:
            content = read_object(directory / "published.json", "")
            seal = content.pop(SEAL, None)  # earlier versions wrote none
            known = cls(**content)
        except (OSError, ValueError, TypeError):
            return None
        return known if seal in (None, known.seal()) else None

    def save(self, directory: Path) -> "Published":
        """Write `published.json`, and return `self`."""
        content = asdict(self) | {SEAL: self.seal()}
        write_atomically(directory / "published.json", json.dumps(content, indent=2) + "\n")
        return self

    def seal(self) -> str:
        """SHA-256 of the content: an offset with another digit would leave out points without a word."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Publisher:
    """Publishes the record in `record_directory` from a thread during its run.

    Enter it before the record, so that the end of the run is recorded when the publisher exits:
    `with Publisher(record.directory, uri), record:`. On exit it waits for `patience` seconds at
    most. The first error becomes a warning; further ones are silent.

    Raises:
        ValueError: on entering, if `tracking_uri` is malformed or not supported.
    """

    def __init__(
        self,
        record_directory: Path,
        tracking_uri: str,
        interval: float = 2.0,
        patience: float = 20.0,
    ) -> None:
        self.record = Record(record_directory)
        self.tracking_uri = tracking_uri
        self.interval = interval  # seconds
        self.patience = patience  # seconds
        self._leaving = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def __enter__(self) -> "Publisher":
        self.tracking_uri = check_tracking_uri(self.tracking_uri)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leaving.set()
        # An interrupted run will resume, and has little time left to be requeued.
        patience = min(self.patience, 5.0) if kind is Interrupted else self.patience
        self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(f"publishing took longer than {patience:g} s")

    def _run(self) -> None:
        publication, failures, last_failures = None, 0, 0
        while True:
            last = self._leaving.is_set()  # read first, so that the last pass sees the complete record
            try:
                if publication is None or (last and self._warned):  # after an error, connect again
                    publication = Publication(self.record, self.tracking_uri)
                publication.publish(artifacts=last)
                failures = 0
                if last:
                    return
            except Exception as error:
                self._warn(one_line(error))
                failures, last_failures = failures + 1, last_failures + last
                if last_failures == 3:
                    return
            if last:
                time.sleep(0.5)
            else:
                self._leaving.wait(self.interval * 2 ** min(failures, 5))

    def _warn(self, trouble: str) -> None:
        if self._warned:
            return
        self._warned = True
        directory = self.record.directory
        log.warning(
            "could not publish to MLflow at %s (%s); the run continues, and its record is safe at %s; "
            "publish the missing parts with `%s`",
            redacted_text(self.tracking_uri),
            trouble if len(trouble) < 300 else f"{trouble[:300]} ...",  # databases quote the whole query
            directory,
            sync_command(directory.parent),
        )


class Publication:
    """The MLflow run of one record, found or created, after the run of its parent.

    The run is found by the record's own id rather than by `published.json`, which may be out of date after
    a crash or in a new store. A server that completed a request after its timeout may have created a
    duplicate run, which is deleted.
    """

    def __init__(self, record: Record, tracking_uri: str) -> None:
        description = record.description()
        experiment = description["experiment"]
        self.record, self.directory = record, record.directory
        self.client, self.experiment_id = open_store(tracking_uri, experiment)
        tags = {"record_id": description["id"], "mlflow.user": _user()}
        parent = record.parent()
        if parent is not None and (parent.directory / "run.json").exists():
            parent_publication = Publication(parent, tracking_uri)
            parent_publication.publish(artifacts=False)  # no other process may publish the parent
            tags["mlflow.parentRunId"] = parent_publication.run_id
        with self._lock():
            run = self._run(description, tags)
            self.run_id: str = run.info.run_id
            self.deleted = run.info.lifecycle_stage == "deleted"  # by a user, in MLflow
            self.empty = Published(redacted_text(tracking_uri), self.experiment_id, self.run_id)
            known = Published.load(self.directory)
            if known is None or known.run_id != self.run_id:
                self.empty.save(self.directory)
            elif known.status and known.status["status"] != run.info.status:
                # The server completed an older request last, so the status is sent again.
                replace(known, status={}).save(self.directory)

    def publish(self, *, artifacts: bool) -> bool:
        """Bring MLflow up to date with the record, and return whether anything was missing there.

        A part that MLflow refuses for good leaves out no other part, and no ended run RUNNING.

        Raises:
            Exception: the first refusal, once everything else is published.
        """
        if self.deleted:
            return False
        with self._lock():
            before = Published.load(self.directory) or self.empty
            artifacts_too = [self._artifacts] if artifacts else []
            refusals: list[Exception] = []
            # FINISHED only once everything is published.
            for part in (self._description, self._metrics, self._other_end, *artifacts_too, self._status):
                try:
                    part(Published.load(self.directory) or self.empty)
                except Exception as error:
                    if not self._has_ended or not _is_refusal(error):
                        raise
                    refusals.append(error)
            if refusals:
                raise refusals[0]
            return (Published.load(self.directory) or self.empty) != before

    @property
    def _has_ended(self) -> bool:
        return self.record.status()["status"] not in ("SCHEDULED", "RUNNING")

    def _other_end(self, published: Published) -> Published:
        return published if self.record.status()["status"] == "FINISHED" else self._status(published)

    def _lock(self) -> FileLock:
        return FileLock(self.directory / "published.lock", timeout=LOCK_PATIENCE)

    def _run(self, description: Mapping[str, Any], tags: dict[str, str]) -> Any:
        from mlflow.entities import ViewType

        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.record_id = '{description['id']}'",
            run_view_type=ViewType.ALL,
        )
        if not runs:
            name, start_time = fitted(description["name"], RUN_NAME_LENGTH), description["start_time"]
            return self.client.create_run(self.experiment_id, start_time, tags, run_name=name)
        known = Published.load(self.directory)
        first = "" if known is None else known.run_id

        def order(run: Any) -> tuple[bool, bool, str]:
            return run.info.run_id != first, run.info.lifecycle_stage == "deleted", run.info.run_id

        kept, *duplicates = sorted(runs, key=order)
        for duplicate in duplicates:
            if duplicate.info.lifecycle_stage != "deleted":
                self.client.delete_run(duplicate.info.run_id)
        return kept

    def _description(self, published: Published) -> Published:
        from mlflow.entities import Param, RunTag

        description = self.record.description()
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        if digest == published.described:
            return published
        params = {key(name): fitted(text, PARAM_LENGTH) for name, text in description["params"].items()}
        tags = {key(name): fitted(text, TAG_LENGTH) for name, text in description["tags"].items()}
        if commit := tags.get("git_commit"):
            tags["mlflow.source.git.commit"] = commit  # the tag that MLflow's own pages show
        for batch in _batched([Param(*item) for item in params.items()]):
            self.client.log_batch(self.run_id, params=batch, synchronous=True)
        for batch in _batched([RunTag(*item) for item in tags.items()]):
            self.client.log_batch(self.run_id, tags=batch, synchronous=True)
        if inputs := [_dataset(item) for item in description["inputs"]]:
            self.client.log_inputs(self.run_id, inputs)
        return replace(published, described=digest).save(self.directory)

    def _metrics(self, published: Published) -> Published:
        for points, offset in self.record.batches(published.offset, METRICS_PER_BATCH):
            # A crash before `save` repeats the batch; MLflow drops rows that it already has.
            metrics = [_metric(point) for point in points]
            self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)
            published = replace(published, offset=offset).save(self.directory)
        return published

    def _status(self, published: Published) -> Published:
        status = self.record.status()
        current = {name: status[name] for name in ("status", "end_time", "error")}
        if current == published.status:
            return published
        if current["status"] in ("SCHEDULED", "RUNNING"):
            self.client.update_run(self.run_id, status=current["status"])
        else:
            self.client.set_terminated(self.run_id, current["status"], current["end_time"])
        if current["error"]:
            self.client.set_tag(self.run_id, "error", fitted(current["error"], TAG_LENGTH))
        elif published.status.get("error"):  # of an earlier attempt
            self.client.delete_tag(self.run_id, "error")
        return replace(published, status=current).save(self.directory)

    def _artifacts(self, published: Published) -> Published:
        root = self.directory / "artifacts"
        for path in sorted(root.rglob("*")):
            if not path.is_file() or path.name.endswith(".tmp"):
                continue
            relative = path.relative_to(root)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if published.artifacts.get(relative.as_posix()) != digest:
                folder = relative.parent.as_posix()
                self.client.log_artifact(self.run_id, path, None if folder == "." else folder)
                artifacts = published.artifacts | {relative.as_posix(): digest}
                published = replace(published, artifacts=artifacts).save(self.directory)
        return published


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow, or the place of its artifacts, refuses an item, and would so again."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500
    return isinstance(error, OSError) and error.filename is not None  # of artifacts; a network has no file


def _metric(point: Point) -> Any:
    from mlflow.entities import Metric

    return Metric(key(point.key), point.value, point.time, point.step)


def _dataset(item: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, digest = fitted(item["name"], DATASET_NAME_LENGTH), fitted(item["digest"], 1000)
    # JSON writes a character outside ASCII as six.
    source = json.dumps({"uri": fitted(item["source"], DATASET_SOURCE_LENGTH // 6)})
    dataset = Dataset(name, digest[:DATASET_DIGEST_LENGTH], "local", source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", fitted(item["context"], CONTEXT_LENGTH))])


def _batched(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Params or tags in batches of which no server refuses the number or the size."""
    batch, size = [], 0
    for item in items:
        added = len(json.dumps([item.key, item.value]))
        if batch and (len(batch) == PARAMS_PER_BATCH or size + added > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += added
    if batch:
        yield batch


def _user() -> str:
    try:
        return fitted(getpass.getuser(), USER_LENGTH)
    except (KeyError, OSError):  # in a container, a user may have no name
        return "unknown"
