import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Run

from runners.signals import terminations_as_exceptions
from runners.tracking import stores
from runners.tracking.__main__ import main
from runners.tracking.publisher import Publication, Publisher
from runners.tracking.record import Record
from runners.tracking.stores import check_experiment, check_tracking_uri, open_store
from runners.tracking.sync import sync

# A warning of MLflow's own, when its sqlite store is opened for the first time.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)

DATA: Any = {"name": "world", "digest": "ab" * 32, "source": "generated", "context": "training"}
PROCESSES = multiprocessing.get_context("forkserver")  # with MLflow imported once for all of them
PROCESSES.set_forkserver_preload(["mlflow", "mlflow.store.tracking.sqlalchemy_store"])


def new(directory: Path, uri: str, **changes: Any) -> Record:
    settings: dict[str, Any] = {
        "experiment": "study",
        "name": directory.name,
        "params": {"beta": 0.1},
        "tags": {"git_commit": "c0ffee"},
        "inputs": [DATA],
        "tracking_uri": uri,
    }
    return Record.create(directory, **(settings | changes))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}", "unused")  # takes seconds, so it is made once and then copied
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def unreachable() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def processes() -> Iterator[Callable[..., Any]]:
    started: list[Any] = []

    def start(target: Callable[..., None], *arguments: Any) -> Any:
        started.append(PROCESSES.Process(target=target, args=arguments))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def publish(record: Record, uri: str) -> bool:
    return Publication(record, uri).publish(artifacts=True)


def runs(uri: str) -> dict[str, Run]:
    """The runs of the experiment by name."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("study")
    stored = client.search_runs([experiment.experiment_id]) if experiment else []
    assert len({run.info.run_name for run in stored}) == len(stored)
    return {str(run.info.run_name): run for run in stored}


def history(uri: str, run: Run, key: str) -> list[tuple[int, float, int]]:
    metrics = MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value, metric.timestamp) for metric in metrics)


def datasets(run: Run) -> list[DatasetInput]:
    assert run.inputs is not None
    return run.inputs.dataset_inputs


def dump(uri: str) -> str:
    """The whole store as text."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        return "\n".join(database.iterdump())


def eventually(holds: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train(directory: Path, uri: str) -> None:
    record = new(directory, uri)
    with Publisher(directory, uri, interval=0.1, patience=60), record:
        for step in range(20):
            record.log({"train/loss": 1 / (step + 1)}, step=step)


def train_until_killed(directory: Path, uri: str) -> None:
    record = new(directory, uri)
    with terminations_as_exceptions(), Publisher(directory, uri, interval=0.1), record:
        record.log({"train/loss": 1.0}, step=0)
        record.log({"train/loss": 0.5}, step=1)
        time.sleep(120)


def test_a_published_run_holds_everything_in_its_record(tmp_path, uri):
    record = new(tmp_path / "run", uri, params={"beta": 0.1, "layers[0]": None})
    with Publisher(record.directory, uri), record:
        record.log({"train/loss": 0.5}, step=1, time=1000)
        record.log({"train/loss": 0.25}, step=2, time=2000)
        record.artifact("config.yaml").write_text("beta: 0.1\n")
        record.artifact("tables/rsf.csv").write_text("step\n")
        record.tag("data_fingerprint", "ff")

    run = runs(uri)["run"]
    assert run.info.status == "FINISHED"
    assert run.info.start_time == record.description()["start_time"]
    assert run.info.end_time == record.status()["end_time"]
    assert run.data.params == {"beta": "0.1", "layers_0_": "None"}
    assert run.data.tags["data_fingerprint"] == "ff"
    assert run.data.tags["git_commit"] == run.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert history(uri, run, "train/loss") == [(1, 0.5, 1000), (2, 0.25, 2000)]
    (read,) = datasets(run)
    assert (read.dataset.name, read.dataset.digest) == ("world", ("ab" * 32)[:36])
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "training")]
    artifacts = tmp_path / "mlflow-artifacts" / run.info.run_id / "artifacts"
    assert (artifacts / "config.yaml").read_text() == "beta: 0.1\n"
    assert (artifacts / "tables" / "rsf.csv").read_text() == "step\n"


def test_a_metric_is_visible_during_the_run(tmp_path, uri):
    record = new(tmp_path / "run", uri)
    with Publisher(record.directory, uri, interval=0.1), record:
        record.log({"loss": 0.5}, step=7, time=1000)
        eventually(lambda: any("loss" in run.data.metrics for run in runs(uri).values()))
        assert runs(uri)["run"].info.status == "RUNNING"
    assert runs(uri)["run"].info.status == "FINISHED"


def test_publishing_again_adds_nothing(tmp_path, uri):
    with new(tmp_path / "run", uri) as record:
        record.log({"loss": 0.5, "nan": math.nan}, step=1)
        record.artifact("table.csv").write_text("step\n")
    assert publish(record, uri)
    before = dump(uri)
    assert not publish(record, uri)
    assert dump(uri) == before


def test_a_crash_before_the_offset_is_written_duplicates_nothing(tmp_path, uri):
    with new(tmp_path / "run", uri) as record:
        for step in range(3):
            record.log({"loss": float(step), "nan": math.nan, "inf": math.inf}, step=step)
        record.artifact("table.csv").write_text("step\n")
    publish(record, uri)
    before = {key: history(uri, runs(uri)["run"], key) for key in ("loss", "inf")}
    (record.directory / "published.json").unlink()
    publish(record, uri)
    run = runs(uri)["run"]
    assert {key: history(uri, run, key) for key in ("loss", "inf")} == before
    assert len(history(uri, run, "nan")) == 3
    assert len(datasets(run)) == 1


def test_a_damaged_offset_leaves_out_no_point_and_duplicates_none(tmp_path, uri):
    record = new(tmp_path / "run", uri)
    record.log({"loss": 1.0}, step=0, time=1000)
    publish(record, uri)
    path = record.directory / "published.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"offset": content["offset"] + 400}))
    record.log({"loss": 0.5}, step=1, time=2000)
    record.end("FINISHED")
    publish(record, uri)
    assert history(uri, runs(uri)["run"], "loss") == [(0, 1.0, 1000), (1, 0.5, 2000)]
    assert not publish(record, uri)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content if key != "sha256"}))  # earlier versions
    assert not publish(record, uri)


def test_more_metrics_than_fit_into_a_batch_all_arrive(tmp_path, uri):
    with new(tmp_path / "run", uri) as record:
        for step in range(2500):
            record.log({"loss": float(step)}, step=step, time=step)
    publish(record, uri)
    assert history(uri, runs(uri)["run"], "loss") == [(n, float(n), n) for n in range(2500)]


def test_only_changed_artifacts_are_sent_again(tmp_path, uri):
    with new(tmp_path / "run", uri) as record:
        record.artifact("same.csv").write_text("step\n")
        record.artifact("changed.csv").write_text("step\n")
    publish(record, uri)
    artifacts = tmp_path / "mlflow-artifacts" / runs(uri)["run"].info.run_id / "artifacts"
    before = (artifacts / "same.csv").stat().st_mtime_ns
    record.artifact("changed.csv").write_text("step,value\n")
    assert publish(record, uri)
    assert (artifacts / "changed.csv").read_text() == "step,value\n"
    assert (artifacts / "same.csv").stat().st_mtime_ns == before


def test_keys_and_values_that_mlflow_refuses_are_made_to_fit(tmp_path, uri):
    params = {"long": "x" * 7000, "probe.rsf.k[0]": 8} | {f"p{n}": n for n in range(150)}
    with new(tmp_path / "run", uri, params=params, tags={"a=b": "c"}) as record:
        record.log({"rsf[q]=(1,2)": 1.0, "../up//x/": 2.0, "": 3.0, "k" * 300: 4.0}, step=0)
    publish(record, uri)
    data = runs(uri)["run"].data
    long = next(key for key in data.metrics if key.startswith("k"))
    assert len(long) == 250 and long.startswith("k" * 239 + "...")
    assert data.metrics == {"rsf_q___1_2_": 1.0, "up/x": 2.0, "_": 3.0, long: 4.0}
    assert data.params["probe.rsf.k_0_"] == "8"
    assert len(data.params) == 152
    assert len(data.params["long"]) == 6000
    assert " ... [cut: 7000 characters in run.json, " in data.params["long"]
    assert data.tags["a_b"] == "c"


def test_every_name_however_long_is_published_and_different_ones_stay_different(tmp_path, uri):
    long = "x" * 70_000
    data = DATA | {"name": long, "source": long + "\u00e9", "context": long}
    for n in range(2):
        with new(
            tmp_path / f"run{n}",
            uri,
            name=long + str(n),
            experiment="study",
            tags={long + str(n): long, "note": "\u00e9" * 4999},
            params={long + str(i): "\u00e9" * 6000 for i in range(30)},
            inputs=[data],
        ) as record:
            record.log({long + "a": 1.0, long + "b": 2.0}, step=0)
        publish(record, uri)
    published = runs(uri)
    assert len(published) == 2 and {run.info.status for run in published.values()} == {"FINISHED"}
    for run in published.values():
        assert len(run.data.metrics) == 2 and len(run.data.params) == 30
        assert len(datasets(run)[0].dataset.name) == 500


def test_an_experiment_with_a_long_name_is_one_experiment(tmp_path, uri):
    for n in range(2):
        with new(tmp_path / f"run{n}", uri, experiment="study " * 100) as record:
            pass
        publish(record, uri)
    names = [stored.name for stored in MlflowClient(uri).search_experiments()]
    assert [len(name) for name in names if name.startswith("study")] == [250]


def test_a_run_whose_artifacts_are_refused_is_not_left_running(tmp_path, uri):
    client = MlflowClient(uri)
    client.create_experiment("study", artifact_location=f"file://{tmp_path}/file/artifacts")
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ValueError, match=rf"'study' cannot be written to {tmp_path}/file/artifacts"):
        check_experiment(uri, "study")
    with new(tmp_path / "outputs" / "run", uri) as record:
        record.log({"loss": 0.5}, step=1)
        record.artifact("table.csv").write_text("step\n")
    (outcome,) = sync(tmp_path / "outputs")
    assert outcome.failed and f"{tmp_path}/file" in outcome.outcome
    assert runs(uri)["run"].info.status == "FINISHED" and runs(uri)["run"].data.metrics
    (tmp_path / "file").unlink()
    check_experiment(uri, "study")
    assert [run.outcome for run in sync(tmp_path / "outputs")] == ["published"]


def test_outputs_that_were_moved_go_on_with_their_artifacts(tmp_path, uri):
    with new(tmp_path / "run", uri) as record:
        record.artifact("table.csv").write_text("step\n")
    publish(record, uri)
    for name in ("mlflow.db", "mlflow-artifacts", "run"):
        (tmp_path / "new place").mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / "new place" / name)
    moved = f"sqlite:///{tmp_path}/new place/mlflow.db"
    check_experiment(moved, "study")
    with new(tmp_path / "new place" / "second", moved) as second:
        second.artifact("table.csv").write_text("step\n")
    publish(second, moved)
    client = MlflowClient(moved)
    for run in runs(moved).values():
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["table.csv"]
    assert not (tmp_path / "mlflow-artifacts").exists()


@pytest.mark.parametrize(
    "name", ["50%", "a%20b", "%41", "a b", "a#b", "\u00e9\u4e2d", "a;b&c=d", "[a]", "x" * 200]
)
def test_a_store_in_a_directory_of_any_name_publishes(tmp_path, empty_database, name):
    (tmp_path / name).mkdir()
    shutil.copy(empty_database, tmp_path / name / "mlflow.db")
    uri = check_tracking_uri(f"sqlite:///{tmp_path}/{name}/mlflow.db")
    with new(tmp_path / name / "run", uri) as record:
        record.artifact("tables/rsf.csv").write_text("step\n")
    publish(record, uri)
    assert [path.parent.name for path in tmp_path.rglob("mlflow.db")] == [name]
    run = runs(stores._quoted(uri))["run"]
    assert (tmp_path / name / "mlflow-artifacts" / run.info.run_id / "artifacts/tables/rsf.csv").exists()


@pytest.mark.parametrize("name", ['it\'s "mine"', ":x", "50%"])
def test_a_new_store_can_be_made_from_a_working_directory_of_any_name(tmp_path, monkeypatch, name):
    home = tmp_path / name
    home.mkdir()
    monkeypatch.chdir(home)
    client, experiment = open_store(f"sqlite:///{home}/outputs/mlflow.db", "study")
    assert client.get_experiment(experiment).name == "study"
    default = client.get_experiment("0").artifact_location
    assert default == f"{(home / 'outputs/mlflow-artifacts').as_uri()}/0"


def test_a_store_with_too_long_a_path_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"has \d+ bytes, and SQLite takes 500: set outputs= to a shorter path"
    ):
        check_tracking_uri(f"sqlite:///{tmp_path}/{'x' * 250}/{'y' * 250}/mlflow.db")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def begun(path: Path) -> None:
    """As a kill leaves it while MLflow makes its tables."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM runs")
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


def without_tables(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE experiments (name TEXT)")


BREAKS = [
    truncated,
    begun,
    without_tables,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("x"),
]


@pytest.mark.parametrize("destroy", BREAKS)
def test_a_broken_store_is_set_aside_and_made_again_from_the_records(
    tmp_path, uri, empty_database, destroy, monkeypatch, caplog
):
    with new(tmp_path / "outputs" / "run", uri) as record:
        record.log({"loss": 0.5}, step=1)
        record.artifact("table.csv").write_text("step\n")
    publish(record, uri)
    destroy(tmp_path / "mlflow.db")
    monkeypatch.setattr(stores, "_WHOLE", set())
    monkeypatch.setattr(stores, "_make_database", lambda path, _: shutil.copy(empty_database, path))
    assert [run.outcome for run in sync(tmp_path / "outputs")] == ["published"]
    (aside,) = tmp_path.glob("mlflow.db.broken-*")
    assert "is broken (" in caplog.text and str(aside) in caplog.text
    run = runs(uri)["run"]
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 0.5}
    assert [file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)] == ["table.csv"]


def test_a_store_of_another_version_that_holds_runs_is_not_set_aside(tmp_path, uri, monkeypatch):
    with new(tmp_path / "run", uri) as record:
        pass
    publish(record, uri)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    monkeypatch.setattr(stores, "_WHOLE", set())
    assert stores._flaw(tmp_path / "mlflow.db") == ""


def test_a_store_is_moved_into_place_whole_and_a_group_may_write_it(tmp_path):
    uri, before = f"sqlite:///{tmp_path}/mlflow.db", os.umask(0o002)
    (tmp_path / ".mlflow.db.0123abcd.tmp").write_bytes(b"left by a kill")
    (tmp_path / "mlflow.db-journal").write_bytes(b"of a store that is gone")
    try:
        open_store(uri, "study")
    finally:
        os.umask(before)
    assert stores._flaw(tmp_path / "mlflow.db") == ""
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"mlflow.db": 0o664, "mlflow.db.lock": 0o664}


def test_a_damaged_record_stops_no_other_and_a_damaged_status_is_an_end(tmp_path, uri):
    for name in ("first", "second", "third"):
        with new(tmp_path / "outputs" / name, uri):
            pass
    (tmp_path / "outputs/first/run.json").write_text("[")
    (tmp_path / "outputs/second/status.json").write_text("")
    (tmp_path / "outputs/third/published.json").write_text("{}")
    first, second, third = sync(tmp_path / "outputs")
    assert first.failed and f"{tmp_path}/outputs/first/run.json is damaged" in first.outcome
    assert (second.status, second.outcome, third.outcome) == ("KILLED", "published", "published")


def test_a_run_that_raises_has_status_failed_and_the_error_as_a_tag(tmp_path, uri):
    record = new(tmp_path / "run", uri)
    with pytest.raises(RuntimeError), Publisher(record.directory, uri), record:
        raise RuntimeError("loss is nan")
    run = runs(uri)["run"]
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "RuntimeError: loss is nan"


def test_a_requeued_job_continues_its_own_run(tmp_path, uri):
    with pytest.raises(RuntimeError), new(tmp_path / "run", uri) as record:
        record.log({"loss": 1.0}, step=0, time=1000)
        raise RuntimeError("node lost")
    publish(record, uri)
    again = new(tmp_path / "run", uri)
    publish(again, uri)
    assert runs(uri)["run"].info.status == "RUNNING"
    with again:
        again.log({"loss": 1.0}, step=0, time=2000)
        again.log({"loss": 0.5}, step=1, time=2000)
    publish(again, uri)
    run = runs(uri)["run"]
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags
    assert history(uri, run, "loss") == [(0, 1.0, 1000), (1, 0.5, 2000)]


def test_a_terminated_run_is_marked_killed_at_once_and_a_killed_one_by_sync(tmp_path, uri, processes):
    outputs = tmp_path / "outputs"
    terminated = processes(train_until_killed, outputs / "terminated", uri)
    killed = processes(train_until_killed, outputs / "killed", uri)

    def both_are_live() -> bool:
        live = runs(uri)
        return len(live) == 2 and all("train/loss" in run.data.metrics for run in live.values())

    eventually(both_are_live)
    assert {run.info.status for run in runs(uri).values()} == {"RUNNING"}
    os.kill(terminated.pid, signal.SIGTERM)
    killed.kill()
    terminated.join(30)
    killed.join(30)
    assert terminated.exitcode == 128 + signal.SIGTERM
    assert runs(uri)["terminated"].info.status == "KILLED"
    assert runs(uri)["killed"].info.status == "RUNNING"

    # A point that was written but not published before the kill, and a torn one.
    last = '{"key": "train/loss", "value": 0.25, "step": 2, "time": 9000}\n{"key": "torn'
    with (outputs / "killed" / "metrics.jsonl").open("a") as file:
        file.write(last)
    assert {run.outcome for run in sync(outputs)} == {"published", "nothing new"}
    run = runs(uri)["killed"]
    assert run.info.status == "KILLED"
    assert history(uri, run, "train/loss")[-1] == (2, 0.25, 9000)
    assert len(history(uri, run, "train/loss")) == 3
    assert {run.outcome for run in sync(outputs)} == {"nothing new"}


def test_four_processes_that_open_a_new_store_at_once_all_publish(tmp_path, processes):
    uri = f"sqlite:///{tmp_path}/fresh/mlflow.db"
    started = [processes(train, tmp_path / f"run{n}", uri) for n in range(4)]
    for process in started:
        process.join(90)
    assert [process.exitcode for process in started] == [0] * 4
    published = runs(uri)
    assert set(published) == {"run0", "run1", "run2", "run3"}
    for run in published.values():
        assert run.info.status == "FINISHED"
        assert len(history(uri, run, "train/loss")) == 20


def test_an_unreachable_store_costs_a_run_one_warning_and_sync_publishes_everything_once(
    tmp_path, uri, unreachable, caplog
):
    outputs = tmp_path / "outputs"
    record = new(outputs / "run", unreachable)
    began = time.monotonic()
    with Publisher(record.directory, unreachable, interval=0.05), record:
        for step in range(10):
            record.log({"loss": float(step)}, step=step, time=1000 + step)
            time.sleep(0.05)
        record.artifact("table.csv").write_text("step\n")
    assert time.monotonic() - began < 10  # mostly the first import of MLflow
    (warning,) = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert f"its record is safe at {record.directory}" in warning.getMessage()
    assert f"with `weightgeom sync {outputs}`" in warning.getMessage()

    (refused,) = sync(outputs)
    assert refused.failed
    for expected in ("published", "nothing new"):
        assert [run.outcome for run in sync(outputs, uri)] == [expected]
        run = runs(uri)["run"]
        assert run.info.status == "FINISHED"
        assert history(uri, run, "loss") == [(n, float(n), 1000 + n) for n in range(10)]
        assert [file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)] == ["table.csv"]


def test_a_store_that_does_not_answer_does_not_delay_the_run(tmp_path, caplog):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts the connection and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        record = new(tmp_path / "run", uri)
        began = time.monotonic()
        with Publisher(record.directory, uri, patience=0.5), record:
            pass
        assert time.monotonic() - began < 5  # a request alone times out after 10
    (message,) = caplog.messages
    assert "publishing took longer than 0.5 s" in message


def test_a_new_store_can_be_filled_from_the_records(tmp_path, uri, empty_database):
    with new(tmp_path / "outputs" / "run", uri) as record:
        record.log({"loss": 0.5}, step=1, time=1000)
    publish(record, uri)
    anew = f"sqlite:///{tmp_path}/anew.db"
    shutil.copy(empty_database, tmp_path / "anew.db")
    publish(record, anew)
    assert history(anew, runs(anew)["run"], "loss") == [(1, 0.5, 1000)]


def test_a_run_deleted_in_mlflow_is_left_alone(tmp_path, uri):
    with new(tmp_path / "outputs" / "run", uri) as record:
        pass
    publish(record, uri)
    MlflowClient(uri).delete_run(runs(uri)["run"].info.run_id)
    (outcome,) = sync(tmp_path / "outputs")
    assert outcome.outcome == "deleted in MLflow, left alone"
    assert not outcome.failed
    assert runs(uri) == {}


def test_children_share_one_parent_in_any_order_of_publication(tmp_path, uri):
    outputs = tmp_path / "outputs"
    parent = new(outputs / "sweep", uri, kind="sweep")
    for n in range(2):
        with new(outputs / f"run{n}", uri, parent=parent.directory) as record:
            pass
        publish(record, uri)
    parent.end("FINISHED")
    sync(outputs)
    published = runs(uri)
    assert set(published) == {"sweep", "run0", "run1"}
    parents = {published[name].data.tags["mlflow.parentRunId"] for name in ("run0", "run1")}
    assert parents == {published["sweep"].info.run_id}
    assert published["sweep"].info.status == "FINISHED"
    assert published["sweep"].data.params == {"beta": "0.1"}


def test_no_secret_reaches_mlflow_or_the_log(tmp_path, uri, unreachable, caplog):
    secret = "hunter2"
    with_password = unreachable.replace("://", f"://me:{secret}@")
    record = new(
        tmp_path / "outputs" / "run",
        with_password,
        params={"hf_token": secret, "hub": [{"password": secret}]},
        tags={"command": f"run.py model.api_key={secret}"},
        inputs=[DATA | {"source": f"https://me:{secret}@host/data"}],
    )
    with (
        pytest.raises(RuntimeError),
        Publisher(record.directory, with_password, interval=0.05),
        record,
    ):
        raise RuntimeError(f"no access to https://me:{secret}@host")
    assert secret not in caplog.text
    assert "http://***@127.0.0.1" in caplog.text
    sync(tmp_path / "outputs", uri)
    assert runs(uri)["run"].data.params["hf_token"] == "***"
    assert "hf_token" in dump(uri)
    assert secret not in dump(uri)
    files = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in files)


def test_sync_asks_for_a_uri_whose_password_the_record_masks(tmp_path, uri, monkeypatch):
    with new(tmp_path / "outputs" / "run", "https://me:hunter2@host"):
        pass
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (outcome,) = sync(tmp_path / "outputs")
    assert outcome.failed
    assert "set MLFLOW_TRACKING_URI or --tracking-uri" in outcome.outcome
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert [run.outcome for run in sync(tmp_path / "outputs")] == ["published"]


def test_the_command_prints_a_line_per_run_and_exits_with_1_if_a_run_fails_to_publish(
    tmp_path, uri, unreachable, capsys
):
    outputs = tmp_path / "outputs"
    for name, where in (("good", uri), ("bad", unreachable)):
        with new(outputs / name, where):
            pass
    assert main(["sync", str(outputs)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"FINISHED  good  {outputs}/good: published" in lines
    assert lines[-1] == "2 runs, 1 could not be published"
    assert main(["sync", str(outputs), "--tracking-uri", uri]) == 0


def test_the_documented_command_works_without_importing_mlflow(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "runners.tracking", "sync", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--tracking-uri" in shown.stdout
    assert "mlflow" not in shown.stderr
    command = [sys.executable, "-m", "runners.tracking", "sync", str(tmp_path / "none")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"no directory {tmp_path}/none" in refused.stderr


def test_a_deleted_experiment_is_refused(tmp_path, uri):
    with new(tmp_path / "run", uri) as record:
        pass
    client, experiment_id = open_store(uri, "study")
    client.delete_experiment(experiment_id)
    for act in (lambda: publish(record, uri), lambda: check_experiment(uri, "study")):
        with pytest.raises(ValueError, match=r"the experiment 'study' was deleted in MLflow: restore"):
            act()


def test_a_relative_sqlite_uri_is_made_absolute_and_a_servers_is_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert check_tracking_uri("sqlite:///outputs/mlflow.db") == expected
    assert check_tracking_uri(expected) == expected
    assert check_tracking_uri("https://host:5000/x") == "https://host:5000/x"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("outputs/mlflow.db", "is not supported: use sqlite:///PATH"),
        ("file:///tmp/mlruns", "is not supported"),
        ("postgresql://me:hunter2@host/db", r"'postgresql://\*\*\*@host/db' is not supported"),
        ("", "'' is not supported"),
        ("http://", "names no host: use http://HOST:5000"),
        ("http://host:port", "is malformed: Port could not be cast"),
        ("sqlite://outputs/mlflow.db", "names no file: use sqlite:///relative"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////tmp", "names no file"),
        ("sqlite:////tmp/a?b/mlflow.db", "holds a question mark: set outputs= to a path without one"),
    ],
)
def test_an_invalid_uri_is_refused_at_once(tmp_path, uri, message):
    with pytest.raises(ValueError, match=message):
        check_tracking_uri(uri)
    with pytest.raises(ValueError, match=message), Publisher(tmp_path, uri):
        raise AssertionError("the run began")
