"""Stages on disk: `outputs/<name>/<signature>/` is complete if and only if it holds DONE."""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runners.redaction import redacted, redacted_text

log = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What writers in other languages say of the same: Rust (safetensors), C++ (Arrow).
_FULL_TEXT = re.compile(r"os error (28|122|27)\b|No space left on device|Disk quota exceeded|File too large")
# `torch.save` does not say why it could not write.
_UNWRITTEN_TEXT = re.compile(r"iostream error|PytorchStreamWriter|inline_container\.cc.*unexpected")


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


def one_line(error: BaseException) -> str:
    """Type and message of `error` on one line, without secrets."""
    return redacted_text(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(": ")


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write `content` so that `path` holds all of it or is as before, even after a power cut.

    `mode` is that of a new file, less the umask: 0o600 for what may hold secrets.

    Raises:
        OSError: if the disk is full.
    """
    # Not `tempfile`: its files are private (0600), and outputs are often shared in a group.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with full_disk_explained(path.parent):
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)  # the new name itself
        finally:
            os.close(parent)


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """Turn every way of saying that the disk is full into one OSError that names `directory`."""
    try:
        yield
    except Exception as error:
        code = _full_disk(error, directory)
        if code is None or str(error).startswith("the disk is full"):
            raise
        explained = OSError(
            f"the disk is full: could not write {directory}; free space or set outputs= to another disk"
        )
        explained.errno = code
        raise explained from error


def _full_disk(error: BaseException | None, directory: Path) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.errno
        if _FULL_TEXT.search(str(error)):
            return errno.ENOSPC
        if _UNWRITTEN_TEXT.search(str(error)):
            return _no_room(directory)
        error = error.__cause__ or error.__context__
    return None


def _no_room(directory: Path) -> int | None:
    probe = directory / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as error:
        return error.errno if error.errno in _FULL else None
    finally:
        probe.unlink(missing_ok=True)
    return None
