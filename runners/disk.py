"""Atomic writes and reads of JSON, and one clear error for every sign of a full disk."""

import errno
import json
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Messages of writers in other languages for the same errors: Rust (safetensors), C++ (Arrow).
_FULL_TEXT = re.compile(r"os error (28|122|27)\b|No space left on device|Disk quota exceeded|File too large")

# `torch.save` does not say why a write failed.
_UNWRITTEN_TEXT = re.compile(r"iostream error|PytorchStreamWriter|inline_container\.cc.*unexpected")


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write `content` atomically: after a power cut `path` holds the new content or the old, never a part.

    `mode` is the new file's mode before the umask: 0o600 for files that may hold secrets.

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
        _flush(path.parent)  # makes the rename durable


def share_with_group(directory: Path) -> None:
    """Let the group write the files of this process, where `directory` says that they are the group's.

    That is: its group may write to it, and new files take its group (setgid). A umask of 022 becomes 002, and
    one that keeps the group from reading stays.
    """
    place = next((place for place in (directory, *directory.parents) if place.is_dir()), None)
    if place is None or not stat.S_ISGID & place.stat().st_mode or not stat.S_IWGRP & place.stat().st_mode:
        return
    mask = os.umask(0o077)
    os.umask(mask & ~stat.S_IWGRP if mask & 0o070 == stat.S_IWGRP else mask)


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with `advice` if it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error
    return content


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def objects_in(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The object in each line of JSON; a line that a kill has cut, or that is damaged, is left out."""
    for line in lines:
        content = None
        with suppress(ValueError, RecursionError):
            content = json.loads(line)
        if isinstance(content, dict):
            yield content


def time_at(directory: Path) -> float:
    """The time by the clock of the file system of `directory`, in seconds since 1970.

    Those of two nodes may differ, and a run may begin on the one and end on the other.

    Raises:
        OSError: if the directory takes no file.
    """
    probe = directory / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def flush_to_disk(directory: Path) -> None:
    """Flush all files and directories under `directory`, and its own name, from the caches to the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            _flush(Path(folder, name))
        _flush(Path(folder))
    _flush(directory.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """Turn every sign of a full disk into one OSError that names `directory`."""
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
    """The errno of a full disk if `error` or one of its causes is that, else None."""
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
    """The errno with which a write of 1 MiB into `directory` fails for lack of space, else None."""
    probe = directory / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as error:
        return error.errno if error.errno in _FULL else None
    finally:
        probe.unlink(missing_ok=True)
    return None
