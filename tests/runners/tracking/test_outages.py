"""During outages of the server or the disk a run continues, and MLflow ends up equal to its record."""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mirror import assert_mirrored, only_run
from mlflow import MlflowClient
from mlflow.entities import ViewType
from servers import Fault, Proxy, Server, free_port, needed
from writers import new, work

from runners.tracking.publisher import Publisher
from runners.tracking.record import Record
from runners.tracking.stores import open_store
from runners.tracking.sync import sync

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
STEPS = 30
FULL_SPEED = 1.5  # seconds allowed for a step: less than the shortest timeout, 2, even on a busy machine


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port).running() as proxy:
        yield proxy


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


def eventually(holds: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def published(record: Record) -> int:
    """The bytes of a record's metrics that are in MLflow according to its published.json."""
    try:
        return int((record.directory / "published.json").read_text().split('"offset": ')[1].split(",")[0])
    except OSError:
        return 0


def test_a_server_killed_during_a_run_gets_all_of_it_after_a_restart_and_sync_publishes_missed_runs(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    outputs = tmp_path / "outputs"
    cut, unseen = new(outputs / "cut", server.uri), new(outputs / "unseen", server.uri)
    with Publisher(cut.directory, server.uri, interval=0.1, patience=60), cut:
        work(cut, STEPS)
        eventually(lambda: published(cut) > 0)
        server.kill()
        with Publisher(unseen.directory, server.uri, interval=0.1), unseen:
            assert work(unseen, STEPS, pause=0.02) < FULL_SPEED
        cut.log({"train/loss": 7.0}, STEPS)
        server.start()
        cut.log({"train/loss": 8.0}, STEPS + 1)
    assert_mirrored(server.uri, cut)
    assert len(warnings(caplog)) == 2  # one for each run
    assert [run.outcome for run in sync(outputs)] == ["nothing new", "published"]
    assert_mirrored(server.uri, cut, unseen)
    assert [run.outcome for run in sync(outputs)] == ["nothing new"] * 2


def test_a_server_that_answers_500_during_the_whole_run_costs_one_warning_and_sync_publishes_everything(
    proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    proxy.fault = lambda number, path: "refuse"
    record = new(tmp_path / "outputs" / "run", proxy.uri)
    with Publisher(record.directory, proxy.uri, interval=0.05), record:
        assert work(record, STEPS, pause=0.02) < FULL_SPEED
    (warning,) = warnings(caplog)
    assert "could not publish to MLflow" in warning and "500" in warning
    assert sync(tmp_path / "outputs")[0].failed
    proxy.fault = lambda number, path: "pass"
    assert [run.outcome for run in sync(tmp_path / "outputs")] == ["published"]
    assert_mirrored(proxy.uri, record)


@pytest.mark.parametrize("fault", ["refuse", "cut"])
def test_after_the_failure_of_any_single_request_the_next_sync_publishes_the_rest(
    proxy: Proxy, tmp_path: Path, fault: Fault
):
    moment = 0
    while True:
        outputs = tmp_path / str(moment)
        record = new(outputs / f"{fault} {moment}", proxy.uri, experiment=f"{fault} {moment % 2}")
        with record:
            work(record, 400)  # 1200 points: two batches
        proxy.requests.clear()
        proxy.fault = lambda number, path, moment=moment: fault if number == moment else "pass"
        sync(outputs)
        requests = len(proxy.requests)
        proxy.fault = lambda number, path: "pass"
        sync(outputs)
        assert_mirrored(proxy.uri, record)
        if requests <= moment:
            break
        moment += 1
    assert moment > 12  # a run, its parameters, tags, inputs, metrics, artifacts and status


def test_a_server_that_loses_answers_and_cuts_connections_has_the_whole_run_after_sync(
    proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    faults: list[Fault] = ["pass", "pass", "pass", "lose answer", "pass", "pass", "pass", "cut"]
    proxy.fault = lambda number, path: faults[number % len(faults)]
    record = new(tmp_path / "outputs" / "run", proxy.uri)
    with Publisher(record.directory, proxy.uri, interval=0.05), record:
        assert work(record, STEPS, pause=0.05) < FULL_SPEED
    assert len(warnings(caplog)) == 1
    proxy.fault = lambda number, path: "pass"
    sync(tmp_path / "outputs")
    assert_mirrored(proxy.uri, record)


@pytest.mark.parametrize("request_path", ["runs/create", "log-batch", "runs/update", ""])
def test_a_server_that_hangs_does_not_delay_a_run_and_its_late_completions_duplicate_nothing(
    proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch, request_path: str
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # seconds
    hung = threading.Semaphore(10_000 if request_path == "" else 1)  # all requests, or the first of its kind

    def fault(number: int, path: str) -> Fault:
        return "hang" if request_path in path and hung.acquire(blocking=False) else "pass"

    proxy.fault = fault
    record = new(tmp_path / "outputs" / "run", proxy.uri)
    with Publisher(record.directory, proxy.uri, interval=0.05, patience=2.0), record:
        assert work(record, STEPS, pause=0.1) < FULL_SPEED
        left = time.monotonic()
    assert time.monotonic() - left < 8  # its patience is 2
    assert len(warnings(caplog)) == 1
    proxy.release.set()  # now the server completes the requests, after the client has given up
    time.sleep(1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    sync(tmp_path / "outputs")
    assert_mirrored(proxy.uri, record)
    assert [run.outcome for run in sync(tmp_path / "outputs")] == ["nothing new"]
    if request_path == "runs/create":  # the duplicate run is deleted
        client = MlflowClient(proxy.uri)
        by_record = f"tags.record_id = '{record.description()['id']}'"
        experiment = only_run(client, record).info.experiment_id
        runs = client.search_runs([experiment], by_record, ViewType.ALL)
        assert sorted(run.info.lifecycle_stage for run in runs) == ["active", "deleted"]


def test_a_server_that_is_stopped_gets_the_missed_metrics_when_it_continues(
    server: Server, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    record = new(tmp_path / "outputs" / "run", server.uri)
    with Publisher(record.directory, server.uri, interval=0.05, patience=30), record:
        work(record, STEPS)
        eventually(lambda: published(record) > 0)
        server.send(signal.SIGSTOP)
        try:
            assert work(record, STEPS, pause=0.1) < FULL_SPEED
        finally:
            server.send(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    sync(tmp_path / "outputs")
    assert_mirrored(server.uri, record)


@contextmanager
def read_only(directory: Path) -> Iterator[Callable[[], object]]:
    """Make `directory` a read-only disk; yields a function that makes it writable again."""
    if subprocess.run(["mount", "--bind", directory, directory], capture_output=True).returncode != 0:
        needed(os.geteuid() != 0, "right to mount")  # permissions do not stop root
        paths = {directory: 0o755, directory / "mlflow.db": 0o644}
        for path, mode in paths.items():
            path.chmod(mode & 0o555)
        yield lambda: [path.chmod(mode) for path, mode in paths.items()]
        return
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield lambda: subprocess.run(["mount", "-o", "remount,bind,rw", directory], check=True)
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_store_on_a_read_only_disk_stops_no_run_and_gets_everything_once_it_is_writable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store, outputs = tmp_path / "store", tmp_path / "outputs"
    uri = f"sqlite:///{store}/mlflow.db"
    open_store(uri, "unused")
    cut, unseen = new(outputs / "cut", uri), new(outputs / "unseen", uri)
    with read_only(store) as make_writable:
        with Publisher(cut.directory, uri, interval=0.05, patience=60), cut:
            assert work(cut, STEPS, pause=0.02) < FULL_SPEED
            with Publisher(unseen.directory, uri, interval=0.05), unseen:
                assert work(unseen, STEPS, pause=0.02) < FULL_SPEED
            assert sync(outputs)[1].failed
            make_writable()
        assert ["could not publish to MLflow" in warning for warning in warnings(caplog)] == [True, True]
        assert_mirrored(uri, cut)
        assert [run.outcome for run in sync(outputs)] == ["nothing new", "published"]
        assert_mirrored(uri, cut, unseen)


def test_a_uri_without_a_server_delays_a_run_by_seconds_at_most(tmp_path: Path):
    uri = f"http://127.0.0.1:{free_port()}"
    record = new(tmp_path / "run", uri)
    began = time.monotonic()
    with Publisher(record.directory, uri, interval=0.05), record:
        work(record, STEPS)
    assert time.monotonic() - began < 10
