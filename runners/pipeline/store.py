"""Stages on disk: `outputs/<name>/<signature>/` is complete if its files are those that DONE lists."""

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runners.disk import flush_to_disk, full_disk_explained, write_atomically
from runners.tracking.redaction import one_line, redacted, redacted_text

log = logging.getLogger(__name__)


def signature(spec: Mapping[str, object]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `spec`: the name of its stage.

    The order of keys does not matter, and a tuple is a list; 1 and 1.0 differ.

    Raises:
        ValueError: if `spec` holds a value that JSON cannot: NaN, infinity, a path, a key that is no text.
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
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where.removeprefix('spec.')} must be a finite number, got {value}")
    elif not (value is None or isinstance(value, str | int | float)):
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
    verify: bool = False,
) -> Path:
    """Directory of the stage `name` for `spec`, made by `work(directory)` unless it is complete.

    Of several processes that want the same stage one works and the others wait for it. If `work`
    raises or is killed, its files stay, with the error in FAILED, until the next call: that starts
    afresh, or where files match the pattern `resumable`, lets `work` go on with all of them.

    The contents of a complete stage's files are compared with DONE once in a process, after that their
    sizes and times of modification; with `verify` always the contents. A damaged stage is made again.

    Raises:
        ValueError: if JSON cannot hold `spec`.
        OSError: if the disk is full.
    """
    directory = outputs / name / signature(spec)
    if _reusable(directory, verify):
        return directory
    with full_disk_explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            if not _reusable(directory, verify):
                before = _remove_damaged(directory)
                _make(directory, spec, work, resumable)
                _compare(directory, before)
    return directory


# The files of the stages that this process has read in full, with their sizes and times of modification.
_VERIFIED: dict[Path, dict[str, tuple[int, int]]] = {}
DONE = "DONE"
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # JSON of another form


def _reusable(directory: Path, verify: bool) -> bool:
    if not (directory / DONE).exists():
        return False
    known = _VERIFIED.get(directory.resolve())
    if verify or known is None or known != _stats(directory, known):
        if flaw(directory):
            return False
        _VERIFIED[directory.resolve()] = _stats(directory, _listed(directory))
    log.info("reusing %s", directory)
    return True


def flaw(directory: Path) -> str:
    """The first difference between a stage's files and DONE; empty if there is none."""
    try:
        listed = _listed(directory)
    except UNREADABLE:
        return f"{DONE} is damaged, or of an earlier version"
    for name, digest in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is not the file that was written"
    return ""


def _listed(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of a complete stage by its path in the directory."""
    files = json.loads((directory / DONE).read_bytes())["files"]
    return {str(name): str(digest) for name, digest in files.items()}


def _stats(directory: Path, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """Size and time of modification of DONE and of files by name; those that are missing are left out."""
    paths = {name: directory / name for name in (*names, DONE)}
    stats = {name: path.stat() for name, path in paths.items() if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_damaged(directory: Path) -> dict[str, str]:
    """Remove a complete stage that is damaged, with a warning; returns the files in DONE."""
    if not (directory / DONE).exists():
        return {}
    log.warning("%s is damaged (%s): making it again", directory, flaw(directory))
    before: dict[str, str] = {}
    with suppress(*UNREADABLE):
        before = _listed(directory)
    (directory / DONE).unlink()  # first, so that a kill leaves no complete stage without files
    shutil.rmtree(directory)
    return before


def _compare(directory: Path, before: Mapping[str, str]) -> None:
    """Warn if results differ from those of the same stage made earlier, as other results rest on them."""
    after = _listed(directory)
    results = [name for name in before if name.endswith((".safetensors", ".parquet"))]
    if other := [name for name in results if after.get(name) != before[name]]:
        log.warning(
            "%s has other bits than before the damage (another machine, or a GPU): stages made from the"
            " earlier ones stay as they are; to make all of them again, set outputs= to a new directory",
            directory / other[0],
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = FileLock(f"{directory}.lock")
    attempts, noted = 0, False
    while not _acquired(lock):
        attempts += 1
        try:
            worker = (directory / "WORKER").read_text()
        except FileNotFoundError:  # the lock comes first, then the name of who has it
            worker = "another process" if attempts == 20 else ""
        if worker and not noted:
            log.info("waiting for %s, which is making %s", worker, directory)
            noted = True
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
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {str(path.relative_to(directory)): _digest(path) for path in files}
    flush_to_disk(directory)  # before DONE, which must not outlive a power cut that the files do not
    done = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), "files": digests}
    write_atomically(directory / DONE, json.dumps(done, indent=1) + "\n")
    _VERIFIED[directory.resolve()] = _stats(directory, digests)
