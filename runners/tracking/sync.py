"""Publishes runs that an outage or a kill left unpublished: `weightgeom sync OUTPUTS`."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runners.tracking.publisher import Publication, check_tracking_uri, sync_command
from runners.tracking.record import Record
from runners.tracking.redaction import MASK, one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The outcome of `sync` for one record: published, nothing new, deleted in MLflow, or an error."""

    directory: Path
    name: str
    status: str
    outcome: str
    failed: bool = False


def sync(outputs: Path, tracking_uri: str | None = None) -> list[Outcome]:
    """Publish everything unpublished under `outputs`, parents first.

    The destination is `tracking_uri`, or else each record's own. A record with status RUNNING whose
    process on this host is gone becomes KILLED; this mutates its status.json.

    Raises:
        ValueError: if `tracking_uri` is malformed or not supported.
        FileNotFoundError: if there is no directory `outputs`.
    """
    if not outputs.is_dir():
        raise FileNotFoundError(f"no directory {outputs}")
    uri = None if tracking_uri is None else check_tracking_uri(tracking_uri)
    directories = (path.parent for path in outputs.rglob("run.json"))
    records = [Record(path) for path in sorted(directories) if (path / "status.json").exists()]
    return [_sync(record, uri) for record in records]


def publish(records: Sequence[Record], tracking_uri: str) -> None:
    """Publish everything unpublished of `records`; the first error becomes a warning and stops the rest."""
    for record in records:
        try:
            Publication(record, check_tracking_uri(tracking_uri)).publish(artifacts=True)
        except Exception as error:
            log.warning(
                "could not publish to MLflow (%s); publish the missing parts with `%s`",
                one_line(error),
                sync_command(records[0].directory.parent),
            )
            return


def _sync(record: Record, uri: str | None) -> Outcome:
    name, status = record.directory.name, "?"
    try:
        if record.died():
            error, last = "the process died without recording its end", record.last_point()
            if last is not None:
                error += f"; its last logged value is {last.key} at step {last.step}"
            record.end("KILLED", error, record.last_sign_of_life())
        name, status = record.description()["name"], record.status()["status"]
        publication = Publication(record, uri or _own_uri(record))
        changed = publication.publish(artifacts=True)
        outcome = "published" if changed else "nothing new"
        outcome = "deleted in MLflow, left alone" if publication.deleted else outcome
        return Outcome(record.directory, name, status, outcome)
    except Exception as error:  # an error with one record must not stop the others
        return Outcome(record.directory, name, status, one_line(error), failed=True)


def _own_uri(record: Record) -> str:
    uri = record.description()["tracking_uri"]
    if MASK in uri:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            raise ValueError(
                "the tracking URI contains a password, which the record masks: "
                "set MLFLOW_TRACKING_URI or --tracking-uri"
            )
    return check_tracking_uri(uri)
