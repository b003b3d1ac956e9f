"""One process at a time: a lock on a file that says who holds it, with a lease where locks do not exist."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runners.disk import read_object, time_at, write_atomically
from runners.signals import process_start

log = logging.getLogger(__name__)
BUSY = {errno.EAGAIN, errno.EACCES}
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
PAUSE = 0.2  # seconds between two tries
BEAT = 10.0  # seconds between two signs of life of the holder of a lease
SILENCE = 60.0  # seconds without one after which a lease is free


@contextmanager
def held(
    path: Path, patience: float | None = None, about: Callable[[], Mapping[str, object]] = dict
) -> Iterator[None]:
    """Hold the lock `path` within the block; the file then holds this host and process, and `about()`.

    Where the file system has no locks, a second file, the lease, stands for the lock: its holder renews it
    every `BEAT` seconds, and after `SILENCE` seconds another may take it. Ages are differences of two times
    of the file system's, because the clocks of two nodes may differ.

    Raises:
        BlockingIOError: if another process holds it for `patience` seconds; None waits without end.
    """
    end = None if patience is None else time.monotonic() + patience
    announced = False
    while (release := _taken(path)) is None:
        holder = holder_of(path)
        if end is not None and time.monotonic() > end:
            raise BlockingIOError(f"{described(holder)} holds {path}: wait for its end, or end it")
        if holder and not announced:
            log.info("waiting for %s, which holds %s", described(holder), path)
            announced = True
        time.sleep(PAUSE)
    try:
        write_atomically(_owner(path), json.dumps(_this_process() | dict(about())) + "\n")
        yield
    finally:
        with suppress(OSError):
            _owner(path).unlink()
        release()


def holder_of(path: Path) -> dict[str, Any] | None:
    """Who holds the lock, as written by the holder; None if nobody does."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as error:
        if error.errno in UNSUPPORTED:
            lease = _lease(path)
            if not lease.exists() or _expired(lease):
                return None
        elif error.errno not in BUSY:
            raise
    return _read(_owner(path))  # empty for the moment between the lock and its owner's name


def described(holder: Mapping[str, Any] | None) -> str:
    """The holder in words."""
    if not holder or not {"pid", "host"} <= holder.keys():
        return "another process"
    attempt = f" (attempt {holder['attempt']} of job {holder.get('id')})" if "attempt" in holder else ""
    return f"process {holder['pid']} on {holder['host']}{attempt}"


def _taken(path: Path) -> Callable[[], None] | None:
    """Take the lock if it is free, and return the function that releases it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_ino != path.stat().st_ino:
            raise BlockingIOError(errno.EAGAIN, "the file was removed meanwhile")
    except OSError as error:
        os.close(file)
        if error.errno in UNSUPPORTED:
            return _leased(_lease(path))
        if error.errno in BUSY or isinstance(error, FileNotFoundError):
            return None
        raise

    def close() -> None:
        nonlocal file
        if file >= 0:
            os.close(file)
            file = -1

    os.register_at_fork(after_in_child=close)  # a worker that outlives a killed run must not hold its lock
    return close


def _leased(lease: Path) -> Callable[[], None] | None:
    """Take the lease if it is free or expired; a thread renews it until the release."""
    token = uuid.uuid4().hex
    mine = lease.with_name(f".{lease.name}.{token[:8]}.tmp")
    mine.write_text(json.dumps({"token": token, **_this_process()}))
    try:
        os.link(mine, lease)  # fails if it exists, on every file system
    except FileExistsError:
        if not _expired(lease):
            return None
        os.replace(mine, lease)
        time.sleep(2 * PAUSE)  # of two that take it at once the last one has it
        if _read(lease).get("token") != token:
            return None
    finally:
        mine.unlink(missing_ok=True)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(BEAT):
            if _read(lease).get("token") != token:
                log.warning("the lease %s was taken by another process", lease)
                return
            with suppress(OSError):
                os.utime(lease)

    threading.Thread(target=renew, daemon=True).start()

    def release() -> None:
        ended.set()
        if _read(lease).get("token") == token:
            lease.unlink(missing_ok=True)

    return release


def _expired(lease: Path) -> bool:
    """Whether the lease was not renewed in time, or its holder on this host is gone."""
    owner = _read(lease)
    pid, here = owner.get("pid"), owner.get("host") == socket.gethostname()
    if here and isinstance(pid, int) and process_start(pid) != owner.get("process_start"):
        return True
    try:
        return time_at(lease.parent) - lease.stat().st_mtime > SILENCE
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "process_start": process_start(os.getpid())}


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_object(path, "")
    return {}


def _owner(path: Path) -> Path:
    return path.with_name(path.name + ".owner")


def _lease(path: Path) -> Path:
    return path.with_name(path.name + ".lease")
