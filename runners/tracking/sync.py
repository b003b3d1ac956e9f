"""Publishes what an outage or a kill left unpublished; run as `python -m runners.tracking sync`."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runners.tracking.publisher import Publication, check_tracking_uri
from runners.tracking.record import Record
from runners.tracking.redaction import MASK, one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What `sync` did for one record: published, nothing new, deleted in MLflow, or the trouble."""

    directory: Path
    name: str
    status: str
    outcome: str
    failed: bool = False


def sync(outputs: Path, tracking_uri: str | None = None) -> list[Outcome]:
    """Publish whatever is unpublished under `outputs`, parents first.

    It goes to `tracking_uri`, or where each record says. A record that says RUNNING, but whose
    process on this host is gone, becomes KILLED; this mutates its status.json.

    Raises:
        ValueError: if `tracking_uri` is malformed or not supported.
        FileNotFoundError: if there is no directory `outputs`.
    """
    if not outputs.is_dir():
        raise FileNotFoundError(f"no directory {outputs}")
    uri = None if tracking_uri is None else check_tracking_uri(tracking_uri)
    found = (path.parent for path in outputs.rglob("run.json"))
    records = [Record(path) for path in sorted(found) if (path / "status.json").exists()]
    return [_sync(record, uri) for record in records]


def publish(records: Sequence[Record], tracking_uri: str) -> None:
    """Publish all that is unpublished of `records`; trouble is told once, as a warning, and ends it."""
    for record in records:
        try:
            Publication(record, check_tracking_uri(tracking_uri)).publish(artifacts=True)
        except Exception as error:
            log.warning(
                "could not publish to MLflow (%s): `python -m runners.tracking sync %s` does what is missing",
                *(one_line(error), records[0].directory.parent),
            )
            return


def _sync(record: Record, uri: str | None) -> Outcome:
    name, status = record.directory.name, "?"
    try:
        if record.died():
            error, last = "the process was gone without noting its end", record.last_point()
            if last is not None:
                error += f"; the last it logged is {last.key} of step {last.step}"
            record.end("KILLED", error, record.last_sign_of_life())
        name, status = record.description()["name"], record.status()["status"]
        publication = Publication(record, uri or _own_uri(record))
        news = publication.publish(artifacts=True)
        outcome = "published" if news else "nothing new"
        outcome = "deleted in MLflow, left alone" if publication.deleted else outcome
        return Outcome(record.directory, name, status, outcome)
    except Exception as error:  # one record's trouble must not keep the others back
        return Outcome(record.directory, name, status, one_line(error), failed=True)


def _own_uri(record: Record) -> str:
    uri = record.description()["tracking_uri"]
    if MASK in uri:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            raise ValueError(
                "the tracking URI held a password, which a record does not keep: "
                "set MLFLOW_TRACKING_URI or --tracking-uri"
            )
    return check_tracking_uri(uri)
