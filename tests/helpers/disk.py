"""A disk with little room."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(directory: Path, room: int) -> Iterator[list[str]]:
    """Leave `room` bytes in `directory`: a file system of that size where mounting is permitted.

    Elsewhere the command that is yielded limits the size of the files of the command behind it,
    which fails in the same place.
    """
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        yield ["sh", "-c", f'ulimit -f {room // 512}; exec "$@"', "sh"]
        return
    try:
        yield []
    finally:
        # Lazily: a file may still be open that a failed write left so.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
