import gc
import json
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.numpy import save_file

from runners.disk import write_atomically
from runners.pipeline import store
from runners.pipeline.store import flaw, signature, stage

SPEC = {"model": {"name": "tiny", "seed": 0}, "lr": 1e-3, "steps": [2, 4]}


def write_result(directory: Path) -> None:
    (directory / "result").write_text("42")


def refuse_to_work(directory: Path) -> None:
    raise AssertionError(f"{directory} was complete")


def work_until_the_other_waits(directory: Path) -> None:
    with (directory.parent / "calls").open("a") as calls:
        calls.write("called\n")
    deadline = time.monotonic() + 20
    logs = [directory.parents[1] / name for name in ("first.log", "second.log")]
    while time.monotonic() < deadline:
        if any(log.exists() and "waiting for" in log.read_text() for log in logs):
            break
        time.sleep(0.05)
    write_result(directory)


def want_stage(outputs: Path, log_file: Path) -> None:
    logging.basicConfig(filename=log_file, level=logging.INFO, force=True)
    stage(outputs, "train", SPEC, work_until_the_other_waits)


def write_results(directory: Path) -> None:
    """A table and a checkpoint, the same every time."""
    pyarrow.parquet.write_table(pyarrow.table({"x": [1.5] * 50}), directory / "rsf.parquet")
    (directory / "step-2").mkdir(exist_ok=True)
    save_file({"x": np.arange(50, dtype=np.float32)}, directory / "step-2" / "model.safetensors")


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages that this process has verified are forgotten, as a new process knows of none."""
    monkeypatch.setattr("runners.pipeline.store._VERIFIED", {})


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "DONE"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def flip(path: Path, bit: int) -> None:
    """Flip one bit, and keep size and time of modification."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_lock_of_a_stage_can_be_taken_by_another_user_of_the_group(tmp_path):
    kept = os.umask(0o002)
    try:
        directory = stage(tmp_path, "train", SPEC, write_result)
    finally:
        os.umask(kept)
    assert Path(f"{directory}.lock").stat().st_mode & 0o060 == 0o060  # it is opened for writing


def test_no_flipped_bit_of_a_finished_stage_is_believed(tmp_path, monkeypatch, caplog):
    directory = stage(tmp_path, "rsf", SPEC, write_results)
    before, rng = contents(directory), random.Random(0)
    for _ in range(30):
        monkeypatch.setattr("runners.pipeline.store._VERIFIED", {})
        caplog.clear()
        name = rng.choice(sorted(before))
        flip(directory / name, rng.randrange(8 * len(before[name])))
        assert stage(tmp_path, "rsf", SPEC, write_results) == directory
        assert (
            f"{directory} is damaged ({name} is not the file that was written): making it again"
            in caplog.text
        )
        assert contents(directory) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["rsf.parquet", "step-2/model.safetensors", "spec.json", "DONE"])
@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), Path.unlink])
def test_a_damaged_stage_is_made_again(tmp_path, name, damage, new_process, caplog):
    directory = stage(tmp_path, "rsf", SPEC, write_results)
    before = contents(directory)
    damage(directory / name)
    caplog.clear()
    stage(tmp_path, "rsf", SPEC, write_results)
    assert contents(directory) == before and flaw(directory) == ""
    if name != "DONE":
        assert f"({name} is " in caplog.text


@pytest.mark.parametrize(
    "content", ["2026-01-01 10:00:00 +0000\n", "[]", "{}", '{"files": []}', "\0", "[" * 9999]
)
def test_a_stage_whose_list_of_files_is_none_is_made_again(tmp_path, content, new_process, caplog):
    directory = stage(tmp_path, "rsf", SPEC, write_results)
    (directory / "DONE").write_text(content)
    stage(tmp_path, "rsf", SPEC, write_results)
    assert "DONE is damaged, or of an earlier version" in caplog.text and flaw(directory) == ""


def test_a_stage_is_read_once_in_a_process_unless_it_changes_or_all_are_verified(tmp_path, monkeypatch):
    directory, read = stage(tmp_path, "rsf", SPEC, write_results), []
    digest = store._digest
    monkeypatch.setattr(store, "_digest", lambda path: read.append(path.name) or digest(path))
    stage(tmp_path, "rsf", SPEC, refuse_to_work)
    assert not read
    stage(tmp_path, "rsf", SPEC, refuse_to_work, verify=True)
    assert sorted(read) == ["model.safetensors", "rsf.parquet", "spec.json"]
    os.utime(directory / "spec.json")
    stage(tmp_path, "rsf", SPEC, refuse_to_work)
    assert len(read) == 6
    stage(tmp_path, "rsf", SPEC, refuse_to_work)
    assert len(read) == 6


def test_results_made_again_with_other_bits_are_named(tmp_path, new_process, caplog):
    def write_other(directory: Path) -> None:
        write_results(directory)
        save_file({"x": np.ones(50, dtype=np.float32)}, directory / "step-2" / "model.safetensors")

    directory = stage(tmp_path, "rsf", SPEC, write_results)
    cut(directory / "rsf.parquet")
    stage(tmp_path, "rsf", SPEC, write_other)
    assert f"{directory}/step-2/model.safetensors has other bits than before the damage" in caplog.text


def test_all_files_and_directories_are_on_the_disk_before_the_stage_is_done(tmp_path, monkeypatch):
    flushed: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert not (directory / "DONE").exists() or flushed[-1] == str(directory)
        fsync(descriptor)

    directory = tmp_path / "rsf" / signature(SPEC)
    monkeypatch.setattr(os, "fsync", watched)
    stage(tmp_path, "rsf", SPEC, write_results)
    done = next(place for place, name in enumerate(flushed) if ".DONE." in name)
    names = ("", "/rsf.parquet", "/step-2", "/step-2/model.safetensors", "/spec.json")
    assert {*(f"{directory}{name}" for name in names), str(directory.parent)} <= set(flushed[:done])


def test_signature_is_sixteen_hex_digits_whatever_the_order_of_keys():
    shuffled = {"steps": (2, 4), "lr": 0.001, "model": {"seed": 0, "name": "tiny"}}
    assert signature(SPEC) == signature(shuffled)
    assert len(signature(SPEC)) == 16
    assert int(signature(SPEC), 16)


def test_signature_changes_with_any_value():
    assert signature(SPEC) != signature(SPEC | {"lr": 2e-3})
    assert signature(SPEC) != signature(SPEC | {"extra": None})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"^x\.y\[0\] must be a finite number, got nan"),
        (float("-inf"), r"^x\.y\[0\] must be a finite number, got -inf"),
        (Path("a"), r"spec\.x\.y\[0\] is .*PosixPath.*which JSON cannot hold"),
        ({1: 2}, r"has the key 1; JSON keys are text"),
    ],
)
def test_signature_refuses_what_json_cannot_hold(value, message):
    with pytest.raises(ValueError, match=message):
        signature({"x": {"y": [value]}})


def test_a_complete_stage_is_reused(tmp_path, caplog):
    directory = stage(tmp_path, "train", SPEC, write_result)
    assert directory == tmp_path / "train" / signature(SPEC)
    assert json.loads((directory / "spec.json").read_text()) == SPEC
    with caplog.at_level(logging.INFO):
        assert stage(tmp_path, "train", SPEC, refuse_to_work) == directory
    assert caplog.messages == [f"reusing {directory}"]


@pytest.mark.parametrize("error", [RuntimeError("loss is\nnan"), KeyboardInterrupt()])
def test_a_failed_stage_keeps_its_files_but_the_next_call_starts_afresh(tmp_path, error):
    def fail(directory: Path) -> None:
        (directory / "checkpoint").write_text("good")
        raise error

    with pytest.raises(type(error)):
        stage(tmp_path, "train", SPEC, fail)
    directory = tmp_path / "train" / signature(SPEC)
    assert (directory / "checkpoint").read_text() == "good"
    assert not (directory / "DONE").exists()
    expected = {
        RuntimeError: "RuntimeError: loss is nan\n",
        KeyboardInterrupt: "KeyboardInterrupt\n",
    }
    assert (directory / "FAILED").read_text() == expected[type(error)]

    stage(tmp_path, "train", SPEC, write_result)
    assert {path.name for path in directory.iterdir()} == {"DONE", "result", "spec.json"}


def test_a_stage_that_can_be_resumed_keeps_its_files_and_one_that_cannot_starts_afresh(tmp_path):
    def fail(directory: Path) -> None:
        (directory / "checkpoint-2").mkdir()
        (directory / "metrics").write_text("1")
        raise RuntimeError

    def go_on(directory: Path) -> None:
        assert (directory / "metrics").read_text() == "1" and not (directory / "FAILED").exists()

    for pattern, work in (("state-*", write_result), ("checkpoint-*", go_on)):
        with pytest.raises(RuntimeError):
            stage(tmp_path, pattern[:5], SPEC, fail, pattern)
        stage(tmp_path, pattern[:5], SPEC, work, pattern)
    assert not (tmp_path / "state" / signature(SPEC) / "metrics").exists()
    assert (tmp_path / "check" / signature(SPEC) / "checkpoint-2").exists()


def test_two_processes_that_want_one_stage_make_it_once_and_one_says_it_waits(tmp_path):
    context = multiprocessing.get_context("fork")  # which has torch already
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    processes = [context.Process(target=want_stage, args=(tmp_path, log)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "train" / "calls").read_text() == "called\n"
    directory = tmp_path / "train" / signature(SPEC)
    assert (directory / "result").read_text() == "42"
    output = "".join(log.read_text() for log in logs)
    assert f"which is making {directory}" in output
    assert any(f"waiting for process {process.pid} on" in output for process in processes)
    assert f"reusing {directory}" in output


def write_bytes(path: Path) -> None:
    path.write_bytes(bytes(200_000))


def write_safetensors(path: Path) -> None:
    save_file({"x": np.zeros(50_000, dtype=np.float32)}, path)


def write_parquet(path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=50_000)
    pyarrow.parquet.write_table(pyarrow.table({"x": noise}), path)


def write_torch(path: Path) -> None:
    torch.save({"x": torch.zeros(50_000)}, path)


WRITERS = [write_bytes, write_safetensors, write_parquet, write_torch]


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_told_in_one_sentence(small_disk: Path, write: Callable[[Path], None]):
    directory = small_disk / "train" / signature(SPEC)
    message = rf"^the disk is full: could not write {directory}; free space or set outputs= to"
    with pytest.raises(OSError, match=message) as caught:
        stage(small_disk, "train", SPEC, lambda directory: write(directory / "weights"))
    assert caught.value.errno is not None
    assert not (directory / "DONE").exists()
    del caught
    gc.collect()  # the traceback of `torch.save` keeps its file open, and so its room taken
    stage(small_disk, "train", SPEC, write_result)  # once there is room


def test_an_atomic_write_that_fails_leaves_the_old_content_and_nothing_else(small_disk: Path):
    path = small_disk / "file"
    write_atomically(path, "old")
    with pytest.raises(OSError, match=f"could not write {small_disk}; free space"):
        write_atomically(path, bytes(200_000))
    assert path.read_text() == "old"
    assert list(small_disk.iterdir()) == [path]


def test_a_write_that_failed_without_a_reason_is_no_full_disk_while_there_is_room(tmp_path):
    def fail(directory: Path) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    with pytest.raises(RuntimeError, match="iostream error"):
        stage(tmp_path, "train", SPEC, fail)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        stage(tmp_path, "train", SPEC, lambda directory: (directory / "no" / "x").touch())


def test_an_atomic_write_is_readable_by_whoever_may_read_its_neighbours(tmp_path):
    write_atomically(tmp_path / "atomic", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_no_secret_of_a_spec_or_an_error_reaches_the_disk(tmp_path):
    def fail(directory: Path) -> None:
        raise RuntimeError("no access to https://me:hunter2@hub")

    with pytest.raises(RuntimeError):
        stage(tmp_path, "train", SPEC | {"hf_token": "hunter2"}, fail)
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("***@hub" in text for text in texts)
    assert not any("hunter2" in text for text in texts)
