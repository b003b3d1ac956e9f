"""A plan on the screen, and what of it does not fit, with what to change."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from runners.planning.machine import available_disk, existing
from runners.planning.plan import Plan, Planner, Stage

GIB = 2.0**30


def show(plans: Sequence[Plan], planner: Planner) -> list[str]:
    """Print the files, the stages and the sums of some jobs; what they share counts once.

    Returns what does not fit, each a clause with what makes it fit.
    """
    from rich import get_console

    console = get_console()
    files = {one.location: one for plan in plans for one in plan.files}
    if files:
        console.print(_files(files))
    found = list({key: stage for plan in plans for key, stage in plan.stages.items()}.values())
    console.print(_stages(found, len(plans)))
    models = dict.fromkeys(f"{plan.model}, {plan.parameters / 1e6:,.4g} million parameters" for plan in plans)
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 1.5 * cores:
        console.print(
            f"{busy:.0f} processes share {cores} cores now: times are of an idle machine", highlight=False
        )
    for line in (*models, *dict.fromkeys(note for plan in plans for note in plan.notes)):
        console.print(line, highlight=False)
    missing = float(sum(one.missing for one in files.values()))
    kept = sum(stage.disk for stage in found) + max((stage.passing for stage in found), default=0.0)
    problems = [*_memory(found, planner), *_disk(planner.outputs, missing, kept, found)]
    memory = max((stage.memory for stage in found), default=0.0)
    words = (
        f"{size(memory)} of {size(planner.machine.memory)} of memory, {size(missing)} to download,"
        f" {size(kept)} of {size(available_disk(planner.outputs))} of disk, about"
        f" {duration(sum(stage.seconds for stage in found))} without the download"
    )
    console.print(
        f"{'does not fit' if problems else 'fits'}: {words}; nothing was started",
        highlight=False,
        soft_wrap=True,
    )
    return problems


def _files(files: Mapping[str, object]) -> object:
    from rich.table import Table

    from weightgeom.bases.hub import CheckpointFiles

    shown = Table("checkpoint", "files", "size", "here already", "to download", title="files")
    for one in files.values():
        assert isinstance(one, CheckpointFiles)
        here = f"{one.cached} files, {size(one.cached_size)}"
        shown.add_row(one.location, str(one.count), size(one.size), here, size(one.missing))
    return _right(shown)


def _stages(stages: Sequence[Stage], jobs: int) -> object:
    """The stages, those of several jobs that are of one kind in one line."""
    from rich.table import Table

    kinds: dict[tuple[str, str], list[Stage]] = {}
    for stage in stages:
        kinds.setdefault((stage.name, stage.what), []).append(stage)
    shown = Table("stage", "what", "time", "memory", "disk", title="stages")
    if jobs > 1:
        shown.title = f"stages of {jobs} jobs; what they share is made once"
        shown.add_column("times")
    for (name, what), some in kinds.items():
        disk = size(sum(one.disk for one in some))
        cells = [
            what,
            duration(sum(one.seconds for one in some)),
            size(max(one.memory for one in some)),
            disk,
        ]
        shown.add_row(name, *cells, *([str(len(some))] if jobs > 1 else []))
    return _right(shown)


def _right(table):  # pyright: ignore
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _memory(stages: Sequence[Stage], planner: Planner) -> Iterator[str]:
    """The stages that take more memory than there is."""
    told = set()
    for stage in stages:
        if stage.memory > planner.machine.memory and stage.name not in told:
            told.add(stage.name)
            free = f"{size(stage.memory)} of memory where {size(planner.machine.memory)} are free"
            shared = f" for each of {planner.parallel} jobs at a time" if planner.parallel > 1 else ""
            how = f": add {stage.knob}" if stage.knob else ": take a smaller model or another machine"
            fewer = int(planner.parallel * planner.machine.memory / stage.memory)
            if fewer and planner.parallel > 1:
                how = f": add hydra.launcher.array_parallelism={fewer}"
            yield f"{stage.name} takes {free}{shared}{how}"


def _disk(outputs: Path, missing: float, kept: float, stages: Sequence[Stage]) -> Iterator[str]:
    """The disks that are too small for the download and for what is made."""
    cache = _cache()
    free, room = available_disk(outputs), available_disk(cache)
    together = existing(outputs).stat().st_dev == existing(cache).stat().st_dev
    if missing > room and not together:
        yield f"the download takes {size(missing)} and {cache} has {size(room)}: set HF_HOME to another disk"
    needed = kept + (missing if together else 0.0)
    if needed > free:
        states = max((stage.passing for stage in stages), default=0.0)
        how = "set outputs= (and HF_HOME, for the download) to another disk"
        if states and needed - states <= free:
            how = "add training.save_every=null, which keeps no states to resume from"
        yield f"download and checkpoints take {size(needed)} and {existing(outputs)} has {size(free)}: {how}"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def size(count: float) -> str:
    """Bytes in words, in powers of ten as the hub has them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB" if count else "-"


def duration(seconds: float) -> str:
    """Seconds in words, as exact as they are."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
