import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from runners.disk import write_atomically
from runners.signals import terminations_as_exceptions
from runners.tracking.record import Point, Record
from weightgeom.interruption import Interrupted

DATA: Any = {"name": "world", "digest": "ab12", "source": "generated", "context": "training"}


def new(directory: Path, **changes: Any) -> Record:
    settings: dict[str, Any] = {
        "experiment": "study",
        "name": "dpo seed 0",
        "params": {"beta": 0.1, "training.steps": 6},
        "tags": {"host": "here"},
        "inputs": [DATA],
        "tracking_uri": "sqlite:////nowhere/mlflow.db",
    }
    return Record.create(directory, **(settings | changes))


def points(record: Record, offset: int = 0) -> list[Point]:
    return [point for batch, _ in record.batches(offset, 1000) for point in batch]


def log_until_killed(directory: Path) -> None:
    record = new(directory)
    record.log({"loss": 1.0}, step=0)
    time.sleep(60)


def test_a_record_describes_its_run(tmp_path):
    record = new(tmp_path / "run")
    description = record.description()
    assert description["experiment"] == "study"
    assert description["name"] == "dpo seed 0"
    assert description["params"] == {"beta": "0.1", "training.steps": "6"}
    assert description["tags"] == {"host": "here"}
    assert description["inputs"] == [DATA]
    assert description["parent"] is None
    assert abs(description["start_time"] / 1000 - time.time()) < 60
    assert record.status()["status"] == "RUNNING"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (RuntimeError("loss is\nnan"), "FAILED", "RuntimeError: loss is nan"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (SystemExit(143), "KILLED", "SystemExit: 143"),
        (SystemExit(1), "FAILED", "SystemExit: 1"),
        (SystemExit(0), "FINISHED", "SystemExit: 0"),
    ],
)
def test_the_status_and_the_error_follow_from_the_exception(tmp_path, error, status, text):
    with pytest.raises(type(error)), new(tmp_path) as record:
        raise error
    assert record.status()["status"] == status
    assert record.status()["error"] == text


def test_an_interrupted_run_is_scheduled_and_has_no_end_time(tmp_path):
    with pytest.raises(Interrupted), new(tmp_path) as record:
        raise Interrupted("stopped after step 3")
    assert record.status()["status"] == "SCHEDULED"
    assert record.status()["end_time"] is None and record.status()["error"] is None
    with new(tmp_path) as record:
        assert record.status()["status"] == "RUNNING"


def test_a_paused_run_is_scheduled_after_a_normal_end_and_goes_on(tmp_path):
    with new(tmp_path) as record:
        record.pause()
    assert record.status()["status"] == "SCHEDULED" and record.status()["end_time"] is None
    with new(tmp_path) as again:
        again.log({"loss": 1.0}, 1)
    assert again.status()["status"] == "FINISHED"
    with pytest.raises(PermissionError):
        record.pause()


def test_a_run_that_ends_normally_is_finished(tmp_path):
    with new(tmp_path) as record:
        pass
    assert record.status()["status"] == "FINISHED"
    assert record.status()["error"] is None
    assert record.status()["end_time"] >= record.description()["start_time"]


def test_sigterm_ends_the_run_as_killed_even_if_a_second_one_arrives_meanwhile(tmp_path, monkeypatch):
    def write_while_terminated_again(path: Path, content: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_atomically(path, content)

    before = signal.getsignal(signal.SIGTERM)
    record = new(tmp_path)
    monkeypatch.setattr("runners.tracking.record.write_atomically", write_while_terminated_again)
    with pytest.raises(SystemExit) as caught, terminations_as_exceptions(), record:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert record.status()["status"] == "KILLED"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU])
def test_other_signals_that_end_a_process_end_the_run_as_killed(tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)
    record = new(tmp_path)
    with pytest.raises(SystemExit) as caught, terminations_as_exceptions(survive=True), record:
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number and record.status()["status"] == "KILLED"
    assert signal.getsignal(number) is signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)  # as behind nohup
    with terminations_as_exceptions():
        os.kill(os.getpid(), number)
    signal.signal(number, before)


def test_sigterm_still_kills_a_forked_worker():
    with terminations_as_exceptions():
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_metrics_are_read_as_they_were_logged_nan_included(tmp_path):
    record = new(tmp_path)
    record.log({"loss": 0.5, "accuracy": math.nan}, step=3, time=1000)
    record.log({"loss": math.inf}, step=4, time=2000)
    loss, accuracy, last = points(record)
    assert loss == Point("loss", 0.5, 3, 1000)
    assert math.isnan(accuracy.value)
    assert last == Point("loss", math.inf, 4, 2000)


def test_batches_continue_from_an_offset(tmp_path):
    record = new(tmp_path)
    for step in range(5):
        record.log({"loss": 1.0}, step=step)
    sizes = [(len(batch), offset) for batch, offset in record.batches(0, 2)]
    assert [size for size, _ in sizes] == [2, 2, 1]
    assert [point.step for point in points(record, sizes[0][1])] == [2, 3, 4]
    assert points(record, sizes[-1][1]) == []


def test_a_torn_last_line_is_ignored_and_a_damaged_one_skipped(tmp_path):
    record = new(tmp_path)
    record.log({"loss": 1.0}, step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        whole = '{"key": "loss", "value": 1.0, "step": 0, "time": 0}'
        damaged = ["[]", "[" * 100_000, whole.replace('"step": 0', '"step": Infinity'), '{"key": "lo']
        file.write("\n".join([*damaged, '{"key": "loss", "val']))
    assert [point.step for point in points(record)] == [0]


def test_a_requeued_job_continues_its_record_without_repeating_a_row(tmp_path):
    with pytest.raises(KeyboardInterrupt), new(tmp_path) as first:
        for step in range(3):
            first.log({"loss": 1 / (step + 1), "nan": math.nan}, step=step)
        raise KeyboardInterrupt
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"key": "loss", "val')
    with new(tmp_path, tags={"attempt": 2}) as second:
        assert second.status()["status"] == "RUNNING"
        for step in range(4):
            second.log({"loss": 1 / (step + 1), "nan": math.nan}, step=step)
        second.log({"loss": 0.0}, step=0)  # another value is another row
    assert [point.step for point in points(second) if point.key == "loss"] == [0, 1, 2, 3, 0]
    assert [point.step for point in points(second) if point.key == "nan"] == [0, 1, 2, 3]
    description = second.description()
    assert description["tags"] == {"host": "here", "attempt": "2"}
    assert description["inputs"] == [DATA]
    assert second.status()["status"] == "FINISHED"
    assert second.status()["error"] is None


def test_a_record_refuses_what_an_attempt_writes_after_a_later_one_began(tmp_path):
    first = new(tmp_path)
    first.log({"loss": 1.0}, step=0)
    second = new(tmp_path)
    for late in (lambda: first.log({"loss": 2.0}, step=1), lambda: first.end("FINISHED"), first.update):
        with pytest.raises(PermissionError, match=r"no longer this attempt's: process .* on .* writes it"):
            late()
    with pytest.raises(RuntimeError), first:
        raise RuntimeError
    assert second.status()["status"] == "RUNNING"
    second.log({"loss": 3.0}, step=1)
    assert [point.value for point in points(second)] == [1.0, 3.0]
    Record(tmp_path).end("KILLED")  # by a watcher, which took the run for dead
    with pytest.raises(PermissionError, match="has ended it"):
        second.log({"loss": 4.0}, step=2)


def test_another_run_cannot_continue_a_record(tmp_path):
    new(tmp_path)
    with pytest.raises(ValueError, match=r"holds the record of another run \(params differ\)"):
        new(tmp_path, params={"beta": 0.2})


def test_tags_and_inputs_may_be_added_later(tmp_path):
    record = new(tmp_path)
    heldout: Any = DATA | {"name": "heldout"}
    record.update(tags={"fingerprint": "ff"}, inputs=[heldout, DATA])
    record.tag("host", "there")
    assert record.description()["tags"] == {"host": "there", "fingerprint": "ff"}
    assert record.description()["inputs"] == [DATA, heldout]


def test_the_directory_of_an_artifact_is_made_inside_the_record(tmp_path):
    record = new(tmp_path)
    record.artifact("tables/rsf.csv").write_text("step\n")
    assert (tmp_path / "artifacts" / "tables" / "rsf.csv").exists()
    with pytest.raises(ValueError, match=r"an artifact stays inside its record, got '../x'"):
        record.artifact("../x")


def test_a_parent_is_found_even_after_both_records_have_moved(tmp_path):
    new(tmp_path / "a" / "sweep", kind="sweep")
    new(tmp_path / "a" / "runs" / "0", parent=tmp_path / "a" / "sweep")
    (tmp_path / "a").rename(tmp_path / "b")
    parent = Record(tmp_path / "b" / "runs" / "0").parent()
    assert parent is not None
    assert parent.directory == tmp_path / "b" / "sweep"
    assert parent.parent() is None


def test_a_run_over_two_nodes_whose_clocks_differ_has_its_duration(tmp_path, monkeypatch):
    ahead = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr("runners.tracking.record.time_ns", lambda: ahead)
    new(tmp_path).log({"loss": 1.0}, step=0)
    monkeypatch.undo()
    new(tmp_path).end("FINISHED")
    took = Record(tmp_path).status()["end_time"] - Record(tmp_path).description()["start_time"]
    assert 0 <= took < 60_000


def test_a_run_has_died_when_its_process_is_gone(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=log_until_killed, args=(tmp_path,))
    process.start()
    while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.02)
    record = Record(tmp_path)
    assert not record.died()
    process.kill()
    process.join()
    assert record.status()["status"] == "RUNNING"
    assert record.died()
    assert abs(record.last_sign_of_life() / 1000 - time.time()) < 60

    status = record.status()
    (tmp_path / "status.json").write_text(json.dumps(status | {"host": "elsewhere"}))
    assert not record.died()  # unknown: the process is on another host
    reused = status | {"pid": os.getpid(), "process_start": "1"}
    (tmp_path / "status.json").write_text(json.dumps(reused))
    assert record.died()  # the pid now belongs to another process


def test_a_sweep_may_outlive_its_process(tmp_path):
    record = new(tmp_path, kind="sweep")
    gone = record.status() | {"process_start": "1"}
    (tmp_path / "status.json").write_text(json.dumps(gone))
    assert not record.died()


def test_on_a_full_disk_the_status_is_still_updated(small_disk: Path):
    record = new(small_disk / "run")
    with pytest.raises(OSError, match="the disk is full: could not write"), record:
        for step in range(10_000):
            record.log({"loss": 1.0}, step=step)
    assert record.status()["status"] == "FAILED"
    assert record.status()["error"].startswith("OSError: the disk is full")
    assert len(points(record)) > 100


def test_no_file_of_a_record_holds_a_secret(tmp_path):
    secret = "hunter2"
    with pytest.raises(RuntimeError):
        record = new(
            tmp_path,
            params={"hf_token": secret, "hub": {"password": secret}, "list": [f"token={secret}"]},
            tags={"api_key": secret, "command": f"run.py model.token={secret}"},
            inputs=[DATA | {"source": f"https://me:{secret}@host/data"}],
            tracking_uri=f"https://me:{secret}@host",
        )
        with record:
            record.tag("secret", secret)
            record.log({"loss": 1.0}, step=0)
            raise RuntimeError(f"401 for https://me:{secret}@host, password: '{secret}'")
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) == 3
    assert not any(secret in text for text in texts)
    assert Record(tmp_path).description()["tracking_uri"] == "https://***@host"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1}', "\0", "[" * 9999])
def test_a_damaged_record_is_named_in_a_sentence(tmp_path, content):
    record = new(tmp_path)
    for name, read in (("run.json", record.description), ("status.json", record.status)):
        (tmp_path / name).write_text(content)
        with pytest.raises(
            ValueError, match=f"{tmp_path}/{name} is damaged .*: bring it back from a copy, or"
        ):
            read()


def test_a_field_of_another_kind_in_a_record_is_named(tmp_path):
    record = new(tmp_path)
    for name, read in (("run.json", record.description), ("status.json", record.status)):
        content = read()
        for field in content.keys() - {"writer", "process_start"}:
            (tmp_path / name).write_text(json.dumps(content | {field: 0.5}))
            with pytest.raises(ValueError, match=rf"{name} is damaged \(its {field} is a float\): bring"):
                read()
        (tmp_path / name).write_text(json.dumps(content))


def test_lines_of_metrics_that_are_no_points_are_skipped(tmp_path):
    record = new(tmp_path)
    record.log({"loss": 0.5}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[]\n7\n{}\n{"key": "a", "value": [], "step": 1, "time": 1}\n\n')
    assert [point.key for point in points(record)] == ["loss"]
