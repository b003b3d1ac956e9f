"""The time and memory of a sweep's jobs, from SLURM's accounting and the jobs' own events."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.disk import objects_in
from runners.launcher import queue
from runners.launcher.manifest import Sweep

SAVED = {"COMPLETED", "TRAINED", "INTERRUPTED"}  # the ends of attempts whose work is not done again

EVENT = {"attempt", "id", "state", "time"}  # of a line of events.jsonl that is whole


@dataclass(frozen=True)
class Usage:
    """The hours of all attempts, those of them that were lost, and the largest memory of one in GiB.

    Lost are attempts that ended without saving, whole: an upper bound, as the next one goes on from the state
    saved before (`training.save_every`).
    """

    hours: float
    lost_hours: float
    peak_memory_gib: float

    def tags(self) -> dict[str, str]:
        """As tags of the sweep's record."""
        return {
            "slurm_hours": f"{self.hours:.2f}",
            "slurm_lost_hours": f"{self.lost_hours:.2f}",
            "slurm_peak_memory_gib": f"{self.peak_memory_gib:.2f}",
        }


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job by its own events: whether its work was saved, and its seconds until then."""

    saved: bool
    seconds: float


def usage(sweep: Sweep) -> Usage | None:
    """The resources used by all jobs of all submissions; None on a site without accounting."""
    allocations = queue.allocations(sweep.every_id())
    if allocations is None:
        return None
    attempts: dict[tuple[str, int], list[Attempt]] = defaultdict(list)
    for directory in sweep.jobs().values():
        for place, attempt in _attempts(directory / "events.jsonl"):
            attempts[place].append(attempt)
    seconds = sum(allocation.seconds for allocation in allocations)
    peak = max((allocation.memory for allocation in allocations), default=0.0)
    return Usage(seconds / 3600, _lost(allocations, attempts) / 3600, peak / 2**30)


def _lost(
    allocations: Iterable[queue.Allocation], attempts: Mapping[tuple[str, int], list[Attempt]]
) -> float:
    """Seconds of allocations with an attempt that was not saved, without their attempts that were."""
    lost, restarts = 0.0, defaultdict[str, int](int)
    for allocation in allocations:
        within = attempts.get((allocation.id, restarts[allocation.id]), [])
        restarts[allocation.id] += 1
        if allocation.state != "COMPLETED" and not (within and all(attempt.saved for attempt in within)):
            lost += max(0.0, allocation.seconds - sum(attempt.seconds for attempt in within if attempt.saved))
    return lost


def _attempts(events: Path) -> Iterator[tuple[tuple[str, int], Attempt]]:
    """The attempts of a job, each with the id and the number of restarts of its allocation."""
    lines = events.read_bytes().splitlines() if events.exists() else []
    by_attempt: dict[int, list[dict[str, Any]]] = {}
    for event in objects_in(lines):
        if EVENT <= event.keys():
            by_attempt.setdefault(event["attempt"], []).append(event)
    for first, *more in by_attempt.values():
        if first["state"] == "RUNNING":  # not what another process says of a job that did not start
            ended = [event for event in more if event["state"] in SAVED]
            seconds = ended[0]["time"] - first["time"] if ended else 0.0
            yield (first["id"], first.get("restarts", 0)), Attempt(bool(ended), seconds)
