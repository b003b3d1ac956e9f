"""Publishes records to MLflow, live and again: the record is the truth, MLflow an index of it.

Publishing never raises into a run and never holds it up, and it may be repeated at will: what
MLflow already has is kept beside the record, in `published.json`.
"""

import getpass
import hashlib
import json
import logging
import os
import posixpath
import re
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

# Limits of MLflow: it cuts longer values silently and refuses longer batches; PostgreSQL, longer names.
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH, NAME_LENGTH, DIGEST_LENGTH = 6000, 5000, 250, 250, 36
METRICS_A_BATCH, PARAMS_A_BATCH = 1000, 100
LOCK_PATIENCE = 60.0  # seconds; creating a fresh store takes about six
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; the default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the publisher tries again by itself
    # A connection that is kept stays as it was opened: read-only, if the disk was that for a while.
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
    shown = redacted_text(uri)
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"tracking_uri {shown!r} is malformed: {error}") from None
    if parts.scheme in {"http", "https"}:
        if not host:
            raise ValueError(f"tracking_uri {shown!r} names no host, as in http://HOST:5000")
        return uri
    if parts.scheme != "sqlite":
        raise ValueError(
            f"tracking_uri {shown!r} is not supported: use sqlite:///PATH/mlflow.db, "
            "http://HOST:PORT or https://HOST"
        )
    name = uri.removeprefix("sqlite:///")
    if name == uri or name in {"", ":memory:"} or "?" in name or Path(name).is_dir():
        raise ValueError(
            f"tracking_uri {shown!r} names no file: use sqlite:///relative/mlflow.db "
            "or sqlite:////absolute/mlflow.db"
        )
    return f"sqlite:///{Path(name).absolute()}"


@dataclass(frozen=True)
class Published:
    """What MLflow already has of a record; `described` and `artifacts` are digests."""

    tracking_uri: str
    experiment_id: str
    run_id: str
    offset: int = 0  # bytes of metrics.jsonl
    described: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "Published | None":
        """What `published.json` says, if there is one that can be read."""
        try:
            return cls(**json.loads((directory / "published.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, directory: Path) -> "Published":
        """Write `published.json`, and return what it says."""
        write_atomically(directory / "published.json", json.dumps(asdict(self), indent=2) + "\n")
        return self


class Publisher:
    """Publishes the record in `record_directory` from a thread while its run goes on.

    Enter it before the record, so that the record has noted its end when the publisher leaves:
    `with Publisher(record.directory, uri), record:`. On leaving it waits `patience` seconds at
    most. Trouble is told once, as a warning.

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
        # A run that is interrupted goes on later, and has little time left to be put back into the queue.
        patience = min(self.patience, 5.0) if kind is Interrupted else self.patience
        self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(f"it took longer than {patience:g} s")

    def _run(self) -> None:
        publication, failures, last_failures = None, 0, 0
        while True:
            last = self._leaving.is_set()  # before the pass, which then sees all there is
            try:
                if publication is None or (last and self._warned):  # after trouble look anew
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
            "could not publish to MLflow at %s (%s); the run goes on, its record is safe at %s, "
            "and `python -m runners.tracking sync %s` publishes what is missing",
            redacted_text(self.tracking_uri),
            trouble if len(trouble) < 300 else f"{trouble[:300]} ...",  # a database quotes its whole query
            directory,
            directory.parent,
        )


class Publication:
    """The MLflow run of one record, found or made; its parent's first.

    The run is found by the record's own id, not by `published.json`: neither a crash right after
    making it nor a store that was deleted since can lead astray. A server that did what was asked
    after it was given up may have made a second one: that is deleted.
    """

    def __init__(self, record: Record, tracking_uri: str) -> None:
        description = record.description()
        experiment = description["experiment"]
        self.record, self.directory = record, record.directory
        self.client, self.experiment_id = open_store(tracking_uri, experiment)
        tags = {"record_id": description["id"], "mlflow.user": _user()}
        parent = record.parent()
        if parent is not None and (parent.directory / "run.json").exists():
            above = Publication(parent, tracking_uri)
            above.publish(artifacts=False)  # nobody else may be there to do it
            tags["mlflow.parentRunId"] = above.run_id
        with self._lock():
            run = self._run(description, tags)
            self.run_id: str = run.info.run_id
            self.deleted = run.info.lifecycle_stage == "deleted"  # by hand, in MLflow
            shown = redacted_text(tracking_uri)
            self.nothing = Published(shown, self.experiment_id, self.run_id)
            known = Published.load(self.directory)
            if known is None or known.run_id != self.run_id:
                self.nothing.save(self.directory)
            elif known.status and known.status["status"] != run.info.status:
                replace(known, status={}).save(self.directory)  # as late: an older one came last

    def publish(self, *, artifacts: bool) -> bool:
        """Bring MLflow up to the record, and return whether anything was missing there."""
        if self.deleted:
            return False
        with self._lock():
            before = Published.load(self.directory) or self.nothing
            after = self._description(before)
            after = self._metrics(after)
            ended = self.record.status()["status"]
            if ended != "FINISHED":
                after = self._status(after)
            if artifacts:
                after = self._artifacts(after)
            after = self._status(after)  # FINISHED only when everything is there
            return after != before

    def _lock(self) -> FileLock:
        return FileLock(self.directory / "published.lock", timeout=LOCK_PATIENCE)

    def _run(self, description: Mapping[str, Any], tags: dict[str, str]) -> Any:
        from mlflow.entities import ViewType

        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.record_id = '{description['id']}'",
            run_view_type=ViewType.ALL,
        )
        if not found:
            name, start_time = _cut(description["name"], NAME_LENGTH), description["start_time"]
            return self.client.create_run(self.experiment_id, start_time, tags, run_name=name)
        known = Published.load(self.directory)
        first = "" if known is None else known.run_id

        def order(run: Any) -> tuple[bool, bool, str]:
            return run.info.run_id != first, run.info.lifecycle_stage == "deleted", run.info.run_id

        kept, *others = sorted(found, key=order)
        for other in others:
            if other.info.lifecycle_stage != "deleted":
                self.client.delete_run(other.info.run_id)
        return kept

    def _description(self, published: Published) -> Published:
        from mlflow.entities import Param, RunTag

        description = self.record.description()
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        if digest == published.described:
            return published
        params = {_key(k): _cut(v, PARAM_LENGTH) for k, v in description["params"].items()}
        tags = {_key(k): _cut(v, TAG_LENGTH) for k, v in description["tags"].items()}
        if commit := tags.get("git_commit"):
            tags["mlflow.source.git.commit"] = commit  # where MLflow's own pages look for it
        for part in _parts([Param(k, v) for k, v in params.items()], PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, params=part, synchronous=True)
        for part in _parts([RunTag(k, v) for k, v in tags.items()], PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, tags=part, synchronous=True)
        if inputs := [_dataset(item) for item in description["inputs"]]:
            self.client.log_inputs(self.run_id, inputs)
        return replace(published, described=digest).save(self.directory)

    def _metrics(self, published: Published) -> Published:
        for points, offset in self.record.batches(published.offset, METRICS_A_BATCH):
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
            self.client.set_tag(self.run_id, "error", _cut(current["error"], TAG_LENGTH))
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


def open_store(tracking_uri: str, experiment: str) -> "tuple[MlflowClient, str]":
    """Client of a store and the id of `experiment` in it, both made if they do not exist.

    A fresh sqlite store fails most of several processes that open it at once, so it is made under
    a lock beside it. Its artifacts go beside it too, to `mlflow-artifacts`.
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
    """Client of a store that answers soon or not at all, and quietly."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it is the publisher that tells of trouble, once
    return MlflowClient(tracking_uri)


def _experiment(client: "MlflowClient", name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location)
        except MlflowException:  # on a server another process may have been first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"the experiment {name!r} was deleted in MLflow: restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or choose another name"
        )
    return found.experiment_id


def _key(name: str) -> str:
    """`name` as MLflow accepts it: letters, digits and `_-. /`, as a path in its shortest form."""
    clean = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)
    parts = [part for part in clean.split("/") if part.strip(".")]
    return posixpath.join(*parts)[:KEY_LENGTH].rstrip("/") if parts else "_"


def _cut(text: str, length: int) -> str:
    text = text.replace("\0", "\\0")  # which PostgreSQL refuses
    mark = f" ... [cut: {len(text)} characters in run.json]"
    return text if len(text) <= length else text[: length - len(mark)] + mark


def _metric(point: Point) -> Any:
    from mlflow.entities import Metric

    return Metric(_key(point.key), point.value, point.time, point.step)


def _dataset(item: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": item["source"]})
    dataset = Dataset(item["name"], item["digest"][:DIGEST_LENGTH], "local", source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", item["context"])])


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"
