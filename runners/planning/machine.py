"""Free memory and disk space of this machine."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter

import psutil

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """The resources of a run: bytes of memory, and bytes per second written to disk.

    `baseline` is the memory of a run before its first stage, `start` the seconds until then.
    """

    memory: float
    baseline: float
    write_speed: float
    start: float


def available_memory(device: str) -> float:
    """Bytes of memory that are free or can be freed; on `cuda`, of the GPU."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    return min(float(psutil.virtual_memory().available), _limit())


def _limit() -> float:
    """Bytes of memory left to a container or a scheduler's job."""
    try:
        most, now = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else float(most) - float(now)


def resident() -> float:
    """Resident memory of this process in bytes, mapped files included."""
    return float(psutil.Process().memory_info().rss)


def available_disk(directory: Path) -> float:
    """Free bytes on the disk of `directory`, which need not exist yet."""
    return float(shutil.disk_usage(existing(directory)).free)


def existing(directory: Path) -> Path:
    """A directory, or its nearest parent that exists."""
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def write_speed(directory: Path, size: int = 2**26) -> float:
    """Bytes per second written to a temporary file in `directory`."""
    content = bytes(size)
    with TemporaryFile(dir=directory) as file:
        start = perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return size / (perf_counter() - start)
