"""Many writers at once, on a shared server with PostgreSQL and on a new sqlite file; the statuses of runs."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from mirror import assert_mirrored, only_run, recorded_lines
from mlflow import MlflowClient
from servers import Server
from writers import new, processes, write, write_until_told

from runners.tracking.record import Record
from runners.tracking.sync import sync

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
WRITERS, STEPS = 16, 40


def rows(database: str, query: str) -> list[tuple[Any, ...]]:
    """The result of a query to PostgreSQL itself, bypassing MLflow."""
    connection = psycopg2.connect(database.replace("+psycopg2", ""))
    try:
        with connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()
    finally:
        connection.close()


def sixteen(outputs: Path, uri: str) -> list[Record]:
    """The records of a sweep and of its runs, all of which finished without a warning."""
    parent = new(outputs / "sweep", uri, kind="sweep")
    places = [outputs / f"run{number}" for number in range(WRITERS)]
    with processes() as start:
        writing = [
            start(write, place, uri, STEPS, parent.directory, outputs / f"{place.name}.log")
            for place in places
        ]
        for process in writing:
            process.join(180)
    assert [process.exitcode for process in writing] == [0] * WRITERS
    assert {path.name: path.read_text() for path in outputs.glob("*.log") if path.read_text()} == {}
    parent.end("FINISHED")
    return [parent, *map(Record, places)]


def test_sixteen_runs_that_start_at_once_on_a_server_are_each_published_once_and_completely(
    server, database, tmp_path
):
    parent, *children = sixteen(tmp_path / "outputs", server.uri)
    assert not any(run.failed for run in sync(tmp_path / "outputs"))  # publishes the end of the sweep
    assert_mirrored(server.uri, parent, *children)
    parent_id = only_run(MlflowClient(server.uri), parent).info.run_id
    runs = f"SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = '{parent_id}'"
    assert rows(database, f"SELECT count(*) FROM ({runs}) AS children") == [(WRITERS,)]
    points = sum(sum(recorded_lines(child).values()) for child in children)
    assert points == WRITERS * STEPS * 3
    assert rows(database, f"SELECT count(*) FROM metrics WHERE run_uuid IN ({runs})") == [(points,)]
    assert rows(
        database, f"SELECT status, count(*) FROM runs WHERE run_uuid IN ({runs}) GROUP BY status"
    ) == [("FINISHED", WRITERS)]


def test_sixteen_runs_that_start_at_once_on_a_new_sqlite_file_are_each_published_once_and_completely(
    tmp_path,
):
    uri = f"sqlite:///{tmp_path}/fresh/mlflow.db"
    parent, *children = sixteen(tmp_path / "outputs", uri)
    assert not any(run.failed for run in sync(tmp_path / "outputs"))
    assert_mirrored(uri, parent, *children)


SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT, "SIGKILL": signal.SIGKILL}
EXPECTED = {
    "exception": ("FAILED", "RuntimeError: the loss is not finite"),
    "SIGTERM": ("KILLED", "SystemExit: 143"),
    "Ctrl-C": ("KILLED", "KeyboardInterrupt"),
    "SIGKILL": (
        "KILLED",
        "the process died without recording its end; its last logged value is rsf_by_layer/q at step 19",
    ),
}


def test_a_server_has_the_status_of_a_run_however_it_ended(server: Server, tmp_path: Path):
    outputs = tmp_path / "outputs"
    client = MlflowClient(server.uri)
    records = {end: Record(outputs / end.lower()) for end in EXPECTED}
    with processes() as start:
        running = {end: start(write_until_told, at.directory, server.uri, end) for end, at in records.items()}
        for end, number in SIGNALS.items():
            wait_for_metrics(client, records[end])
            assert only_run(client, records[end]).info.status == "RUNNING"
            os.kill(running[end].pid, number)
        for process in running.values():
            process.join(180)
    statuses = {end: only_run(client, record).info.status for end, record in records.items()}
    assert statuses == {end: status for end, (status, _) in EXPECTED.items()} | {"SIGKILL": "RUNNING"}
    assert sum(run.outcome == "published" for run in sync(outputs)) == 1
    assert_mirrored(server.uri, *records.values())
    for end, expected in EXPECTED.items():
        run = only_run(client, records[end])
        assert (run.info.status, run.data.tags["error"]) == expected
        assert run.info.end_time == records[end].status()["end_time"] >= run.info.start_time


def wait_for_metrics(client: MlflowClient, record: Record) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            if only_run(client, record).data.metrics:
                return
        except (OSError, AssertionError, ValueError):  # not published yet
            pass
        time.sleep(0.1)
    raise AssertionError(f"{record.directory} is not published")
