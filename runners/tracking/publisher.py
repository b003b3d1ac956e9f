"""Publishes records to MLflow during and after a run; the record is primary, MLflow an index of it.

Publishing never raises into a run or delays it, and can be repeated: `published.json`, next to the record,
keeps track of everything that MLflow already has.
"""

import getpass
import hashlib
import json
import logging
import os
import posixpath
import re
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from runners.disk import write_atomically
from runners.tracking.record import Point, Record
from runners.tracking.redaction import one_line, redacted_text
from weightgeom.interruption import Interrupted

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# MLflow silently cuts longer values and refuses longer batches; PostgreSQL refuses longer names.
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH, NAME_LENGTH, DIGEST_LENGTH = 6000, 5000, 250, 250, 36
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
LOCK_PATIENCE = 60.0  # seconds; creating a new store takes about six
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; the default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the publisher retries by itself
    # A pooled connection keeps the mode in which it was opened: read-only, if the disk was so at the time.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def check_tracking_uri(uri: str) -> str:
    """`uri` with the path of a sqlite file made absolute; http and https pass unchanged.

    Raises:
        ValueError: if it is malformed, or of a kind that is not supported.
    """
    masked = redacted_text(uri)
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"tracking_uri {masked!r} is malformed: {error}") from None
    if parts.scheme in {"http", "https"}:
        if not host:
            raise ValueError(f"tracking_uri {masked!r} names no host: use {parts.scheme}://HOST:5000")
        return uri
    if parts.scheme != "sqlite":
        raise ValueError(
            f"tracking_uri {masked!r} is not supported: use sqlite:///PATH/mlflow.db, "
            "http://HOST:PORT or https://HOST"
        )
    name = uri.removeprefix("sqlite:///")
    if name == uri or name in {"", ":memory:"} or "?" in name or Path(name).is_dir():
        raise ValueError(
            f"tracking_uri {masked!r} names no file: use sqlite:///relative/mlflow.db "
            "or sqlite:////absolute/mlflow.db"
        )
    return f"sqlite:///{Path(name).absolute()}"


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
        """The content of `published.json`, None if there is no readable one."""
        try:
            return cls(**json.loads((directory / "published.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, directory: Path) -> "Published":
        """Write `published.json`, and return `self`."""
        write_atomically(directory / "published.json", json.dumps(asdict(self), indent=2) + "\n")
        return self


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
        """Bring MLflow up to date with the record, and return whether anything was missing there."""
        if self.deleted:
            return False
        with self._lock():
            before = Published.load(self.directory) or self.empty
            after = self._description(before)
            after = self._metrics(after)
            ended = self.record.status()["status"]
            if ended != "FINISHED":
                after = self._status(after)
            if artifacts:
                after = self._artifacts(after)
            after = self._status(after)  # FINISHED only once everything is published
            return after != before

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
            name, start_time = _shortened(description["name"], NAME_LENGTH), description["start_time"]
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
        params = {
            _mlflow_key(key): _shortened(text, PARAM_LENGTH) for key, text in description["params"].items()
        }
        tags = {_mlflow_key(key): _shortened(text, TAG_LENGTH) for key, text in description["tags"].items()}
        if commit := tags.get("git_commit"):
            tags["mlflow.source.git.commit"] = commit  # the tag that MLflow's own pages show
        for batch in _batched([Param(key, text) for key, text in params.items()], PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=batch, synchronous=True)
        for batch in _batched([RunTag(key, text) for key, text in tags.items()], PARAMS_PER_BATCH):
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
            self.client.set_tag(self.run_id, "error", _shortened(current["error"], TAG_LENGTH))
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


def sync_command(outputs: Path) -> str:
    """The command that publishes everything unpublished under `outputs`."""
    return shlex.join(["weightgeom", "sync", str(outputs)])


def open_store(tracking_uri: str, experiment: str) -> "tuple[MlflowClient, str]":
    """The client of a store and the id of `experiment` in it; both are created if they do not exist.

    When several processes open a new sqlite store at once, most of them fail; the store is therefore created
    under a lock. The lock and the artifacts, in `mlflow-artifacts`, are in the directory of the store.
    """
    if not tracking_uri.startswith("sqlite:"):
        client = open_client(tracking_uri)
        return client, _experiment(client, experiment, None)
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock", timeout=LOCK_PATIENCE):
        client = open_client(tracking_uri)
        location = (database.parent / "mlflow-artifacts").as_uri()
        return client, _experiment(client, experiment, location)


def open_client(tracking_uri: str) -> "MlflowClient":
    """The client of a store, with short timeouts and without log lines."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # the publisher itself logs one warning
    return MlflowClient(tracking_uri)


def _experiment(client: "MlflowClient", name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    stored = client.get_experiment_by_name(name)
    if stored is None:
        try:
            return client.create_experiment(name, artifact_location)
        except MlflowException:  # on a server, another process may have created it in the meantime
            stored = client.get_experiment_by_name(name)
            if stored is None:
                raise
    if stored.lifecycle_stage == "deleted":
        raise ValueError(
            f"the experiment {name!r} was deleted in MLflow: restore it "
            f"(mlflow experiments restore -x {stored.experiment_id}) or set name= to another one"
        )
    return stored.experiment_id


def _mlflow_key(name: str) -> str:
    """`name` in the form that MLflow accepts: letters, digits and `_-. /`, as a path in its shortest form."""
    clean = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)
    parts = [part for part in clean.split("/") if part.strip(".")]
    return posixpath.join(*parts)[:KEY_LENGTH].rstrip("/") if parts else "_"


def _shortened(text: str, length: int) -> str:
    text = text.replace("\0", "\\0")  # PostgreSQL refuses NUL characters
    mark = f" ... [cut: {len(text)} characters in run.json]"
    return text if len(text) <= length else text[: length - len(mark)] + mark


def _metric(point: Point) -> Any:
    from mlflow.entities import Metric

    return Metric(_mlflow_key(point.key), point.value, point.time, point.step)


def _dataset(item: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": item["source"]})
    dataset = Dataset(item["name"], item["digest"][:DIGEST_LENGTH], "local", source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", item["context"])])


def _batched(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user may have no name
        return "unknown"
