"""The MLflow stores that runs are published to: a server, or a sqlite file that is made and mended here."""

import logging
import os
import shlex
import sqlite3
import time
from contextlib import closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from runners.disk import write_atomically
from runners.tracking.limits import EXPERIMENT_NAME_LENGTH, SQLITE_PATH, fitted
from runners.tracking.redaction import redacted_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

ARTIFACTS = "mlflow-artifacts"  # in the directory of a sqlite store
CHECKED_SIZE = 64 << 20  # bytes; a larger store is not read as a whole when it is opened
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
    if "?" in name:
        raise ValueError(f"tracking_uri {masked!r} holds a question mark: set outputs= to a path without one")
    if name == uri or name in {"", ":memory:"} or Path(name).is_dir():
        raise ValueError(
            f"tracking_uri {masked!r} names no file: use sqlite:///relative/mlflow.db "
            "or sqlite:////absolute/mlflow.db"
        )
    path = Path(name).absolute()
    if len(os.fsencode(path)) > SQLITE_PATH:
        raise ValueError(
            f"the path of the MLflow store has {len(os.fsencode(path))} bytes, and SQLite takes"
            f" {SQLITE_PATH}: set outputs= to a shorter path, or tracking_uri=sqlite:////SHORT/mlflow.db"
        )
    return f"sqlite:///{path}"


def check_experiment(tracking_uri: str, experiment: str) -> None:
    """Refuse, before a run, an experiment of a sqlite store that takes no runs; a server is not asked.

    Raises:
        ValueError: if it was deleted in MLflow, or its artifacts can be written nowhere.
    """
    stored = _stored_experiment(_database(tracking_uri), experiment)
    if stored is None:
        return
    number, stage, location = stored
    if stage == "deleted":
        raise ValueError(_deleted(experiment, number))
    directory = _local_path(location)
    if directory is None or _is_moved(directory) or _writable(directory):
        return
    raise ValueError(
        f"the artifacts of the experiment {experiment!r} cannot be written to {directory}, where MLflow"
        " keeps them: make that directory again, or set name= to another experiment"
    )


def sync_command(outputs: Path) -> str:
    """The command that publishes everything unpublished under `outputs`."""
    return shlex.join(["weightgeom", "sync", str(outputs)])


def open_store(tracking_uri: str, experiment: str) -> "tuple[MlflowClient, str]":
    """The client of a store and the id of `experiment` in it; both are created if they do not exist.

    When several processes open a new sqlite store at once, most of them fail; the store is therefore created
    under a lock. The lock and the artifacts, in `mlflow-artifacts`, are in the directory of the store.
    """
    experiment = fitted(experiment, EXPERIMENT_NAME_LENGTH)
    database = _database(tracking_uri)
    if database is None:
        client = open_client(tracking_uri)
        return client, _experiment(client, experiment, None)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock", timeout=LOCK_PATIENCE):
        _set_aside_if_broken(database)
        location = (database.parent / ARTIFACTS).as_uri()
        if not database.exists():
            _make_database(database, location)
        _relocate_artifacts(database, experiment, location)
        client = open_client(tracking_uri)
        return client, _experiment(client, experiment, location)


def _database(tracking_uri: str) -> Path | None:
    """The file of a sqlite store; None for a server."""
    name = tracking_uri.removeprefix("sqlite:///")
    return None if name == tracking_uri else Path(name)


def _make_database(database: Path, location: str) -> None:
    """Make a new store elsewhere and put it into place whole: MLflow cannot use one that is cut short.

    Its own experiment, Default, has its artifacts at `location`: by default they would be in the working
    directory, whose name MLflow writes into SQL as it is, and no name with quotes would do.
    """
    for left in database.parent.glob(f".{database.name}.*.tmp"):  # by a kill
        left.unlink()
    with TemporaryDirectory(prefix="mlflow-") as directory:
        made = Path(directory, "mlflow.db")
        _set_up()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(_quoted(f"sqlite:///{made}"), location)
        write_atomically(database, made.read_bytes())


_WHOLE: set[tuple[Path, int]] = set()  # stores that this process has checked, with their inodes


def _set_aside_if_broken(database: Path) -> None:
    """Rename a store that SQLite cannot read, or whose making was cut before it held a run."""
    leftovers = [Path(f"{database}{ending}") for ending in ("-journal", "-wal", "-shm")]
    if not database.exists():
        for path in leftovers:  # they would be played into the new store
            path.unlink(missing_ok=True)
        return
    checked = database, database.stat().st_ino
    if checked in _WHOLE:
        return
    flaw = _flaw(database)
    if not flaw:
        _WHOLE.add(checked)
        return
    aside = database.with_name(f"{database.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    for path in (database, *leftovers):
        if path.exists():
            path.rename(f"{aside}{path.name.removeprefix(database.name)}")
    log.warning(
        "the MLflow store %s is broken (%s): it is now %s, and a new one is made; fill it from the records"
        " with `%s`",
        database,
        flaw,
        aside,
        sync_command(database.parent),
    )


def _flaw(database: Path) -> str:
    """The reason why a store is broken; empty if it is whole, or cannot be read for another reason."""
    if database.stat().st_size == 0:
        return "it is empty"
    try:
        with closing(_connection(database)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if tables and "experiments" not in tables:  # a database of something else
                return ""
            if not {"experiments", "runs", "alembic_version"} <= tables:
                return "its tables are incomplete"
            (runs,) = connection.execute("SELECT count(*) FROM runs").fetchone()
            if database.stat().st_size < CHECKED_SIZE:
                (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if state != "ok":
                    return str(state)
            versions = [version for (version,) in connection.execute("SELECT * FROM alembic_version")]
    except sqlite3.OperationalError as error:  # locked, no permission, an incomplete schema
        return str(error) if "no such" in str(error) else ""
    except sqlite3.DatabaseError as error:  # no database, malformed
        return str(error)
    return "its making was interrupted" if not runs and versions != [_newest_version()] else ""


@cache
def _newest_version() -> str:
    """The version of the tables that the installed MLflow works with."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return _get_latest_schema_revision()


def _connection(database: Path) -> sqlite3.Connection:
    # Not read-only: a transaction that a kill has left half written is rolled back first.
    return sqlite3.connect(f"file:{quote(str(database))}?mode=rw", uri=True, timeout=LOCK_PATIENCE)


def _stored_experiment(database: Path | None, name: str) -> tuple[int, str, str] | None:
    """Id, lifecycle stage and artifact location of an experiment in a sqlite store that can be read."""
    if database is None or not database.exists():
        return None
    query = "SELECT experiment_id, lifecycle_stage, artifact_location FROM experiments WHERE name = ?"
    try:
        with closing(_connection(database)) as connection:
            return connection.execute(query, [fitted(name, EXPERIMENT_NAME_LENGTH)]).fetchone()
    except sqlite3.Error:  # publishing says more
        return None


def _relocate_artifacts(database: Path, experiment: str, location: str) -> None:
    """Let a store that was moved together with its artifacts find them at their new place."""
    stored = _stored_experiment(database, experiment)
    old = None if stored is None else _local_path(stored[2])
    if stored is None or old is None or stored[2] == location or not _is_moved(old):
        return
    log.warning(
        "the artifacts of %s are no longer in %s: MLflow now looks in the store's own directory",
        experiment,
        old,
    )
    with closing(_connection(database)) as connection, connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", [location, stored[2]]
        )
        length = len(stored[2]) + 1
        connection.execute(
            "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?)"
            " WHERE substr(artifact_uri, 1, ?) = ?",
            [location, length, length, f"{stored[2]}/"],
        )


def _is_moved(directory: Path) -> bool:
    """Whether artifacts in a store's directory are no longer there."""
    return directory.name == ARTIFACTS and not directory.is_dir()


def _local_path(location: str) -> Path | None:
    """The directory that an artifact location names on this machine; None for one elsewhere."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(location)


def _writable(directory: Path) -> bool:
    """Whether a directory is there, or can be made, and can be written to."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def open_client(tracking_uri: str) -> "MlflowClient":
    """The client of a store, with short timeouts and without log lines."""
    _set_up()
    from mlflow import MlflowClient

    return MlflowClient(_quoted(tracking_uri))


def _set_up() -> None:
    """Set MLflow's variables, before it is imported, and silence it: the publisher logs one warning."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)


def _quoted(tracking_uri: str) -> str:
    """The URI of a sqlite store as SQLAlchemy takes it: newer versions decode `%20` in a path."""
    database = _database(tracking_uri)
    if database is None or "%" not in tracking_uri:
        return tracking_uri
    from sqlalchemy import make_url

    as_it_is = make_url(tracking_uri).database == str(database)
    return tracking_uri if as_it_is else tracking_uri.replace("%", "%25")


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
        raise ValueError(_deleted(name, stored.experiment_id))
    return stored.experiment_id


def _deleted(name: str, number: object) -> str:
    return (
        f"the experiment {name!r} was deleted in MLflow: restore it "
        f"(mlflow experiments restore -x {number}) or set name= to another one"
    )
