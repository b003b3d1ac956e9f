"""Stages on disk: `outputs/<name>/<signature>/` is complete if and only if it holds DONE."""

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runners.disk import full_disk_explained, write_atomically
from runners.tracking.redaction import one_line, redacted, redacted_text

log = logging.getLogger(__name__)


def signature(spec: Mapping[str, object]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `spec`: the name of its stage.

    The order of keys does not matter, and a tuple is a list; 1 and 1.0 differ.

    Raises:
        ValueError: if `spec` holds what JSON cannot: NaN, infinity, a path, a key that is no text.
    """
    _check_json(spec, "spec")
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_json(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keys are text")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, str | int | float)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError(
            f"{where} is {redacted_text(repr(value))} ({type(value).__name__}), "
            "which JSON cannot hold; use text, finite numbers, booleans, lists and mappings"
        )


def stage(
    outputs: Path,
    name: str,
    spec: Mapping[str, object],
    work: Callable[[Path], None],
    resumable: str | None = None,
) -> Path:
    """Directory of the stage `name` for `spec`, made by `work(directory)` unless it is complete.

    Of several processes that want the same stage one works and the others wait for it. If `work`
    raises or is killed, what it wrote stays, with the error in FAILED, until the next call: that starts
    afresh, or where it finds what the pattern `resumable` matches, lets `work` go on with all there is.

    Raises:
        ValueError: if JSON cannot hold `spec`.
        OSError: if the disk is full.
    """
    directory = outputs / name / signature(spec)
    if (directory / "DONE").exists():
        log.info("reusing %s", directory)
        return directory
    with full_disk_explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            if (directory / "DONE").exists():
                log.info("reusing %s", directory)
            else:
                _make(directory, spec, work, resumable)
    return directory


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = FileLock(f"{directory}.lock")
    attempts, told = 0, False
    while not _acquired(lock):
        attempts += 1
        try:
            worker = (directory / "WORKER").read_text()
        except FileNotFoundError:  # the lock comes first, then the name of who has it
            worker = "another process" if attempts == 20 else ""
        if worker and not told:
            log.info("waiting for %s, which is making %s", worker, directory)
            told = True
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        return False
    return True


def _make(
    directory: Path, spec: Mapping[str, object], work: Callable[[Path], None], resumable: str | None
) -> None:
    if resumable is not None and any(directory.glob(resumable)):
        log.info("going on with %s: it was left without DONE", directory)
        (directory / "FAILED").unlink(missing_ok=True)
    elif directory.exists():
        log.info("starting %s afresh: it was left without DONE", directory)
        shutil.rmtree(directory)
    directory.mkdir(exist_ok=True)
    write_atomically(directory / "WORKER", f"process {os.getpid()} on {socket.gethostname()}")
    write_atomically(directory / "spec.json", json.dumps(redacted(spec), indent=2, sort_keys=True))
    try:
        with full_disk_explained(directory):
            work(directory)
    except BaseException as error:
        with suppress(OSError):  # a full disk may hold no FAILED; without DONE it is clear enough
            (directory / "FAILED").write_text(one_line(error) + "\n")
        raise
    finally:
        (directory / "WORKER").unlink(missing_ok=True)
    write_atomically(directory / "DONE", time.strftime("%Y-%m-%d %H:%M:%S %z\n"))
