"""What this machine has left: memory and disk."""

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
    """What a run may take: bytes of memory, and bytes of disk a second.

    `baseline` is the memory that it has before it does anything, `start` the seconds until then.
    """

    memory: float
    baseline: float
    write_speed: float
    start: float


def available_memory(device: str) -> float:
    """Bytes of memory that are free, or would be made free: of the GPU where that computes."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    return min(float(psutil.virtual_memory().available), _limit())


def _limit() -> float:
    """What a container or a job of a scheduler may still take."""
    try:
        most, now = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else float(most) - float(now)


def resident() -> float:
    """Bytes of this process in memory, mapped files included."""
    return float(psutil.Process().memory_info().rss)


def available_disk(directory: Path) -> float:
    """Bytes free where `directory` is, or would be."""
    return float(shutil.disk_usage(existing(directory)).free)


def existing(directory: Path) -> Path:
    """A directory, or the nearest above it that there is."""
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def write_speed(directory: Path, size: int = 2**26) -> float:
    """Bytes a second that a file in `directory` takes, of one without a name that is gone afterwards."""
    content = bytes(size)
    with TemporaryFile(dir=directory) as file:
        start = perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return size / (perf_counter() - start)
