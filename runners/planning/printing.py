"""Plans in the terminal, and their problems: stages that do not fit, each with a remedy."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from runners.planning.machine import available_disk, existing
from runners.planning.plan import Plan, PlannedStage, Planner
from runners.summary.durations import duration


def show(plans: Sequence[Plan], planner: Planner) -> list[str]:
    """Print the files, the stages and the totals of jobs; shared stages count once.

    Returns the problems: one clause, with its remedy, for each resource that does not suffice.
    """
    from rich import get_console

    console = get_console()
    files = {checkpoint.location: checkpoint for plan in plans for checkpoint in plan.files}
    if files:
        console.print(_file_table(files))
    stages = list({key: stage for plan in plans for key, stage in plan.stages.items()}.values())
    console.print(_stage_table(stages, len(plans)))
    models = dict.fromkeys(f"{plan.model}, {plan.parameters / 1e6:,.4g} million parameters" for plan in plans)
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 1.5 * cores:
        console.print(
            f"{busy:.0f} processes share {cores} cores now: times are for an idle machine", highlight=False
        )
    for line in (*models, *dict.fromkeys(note for plan in plans for note in plan.notes)):
        console.print(line, highlight=False)
    missing = float(sum(checkpoint.missing for checkpoint in files.values()))
    kept = sum(stage.disk for stage in stages) + max((stage.temporary_disk for stage in stages), default=0.0)
    problems = [*_memory_problems(stages, planner), *_disk_problems(planner.outputs, missing, kept, stages)]
    memory = max((stage.memory for stage in stages), default=0.0)
    streamed = sum(checkpoint.size for checkpoint in files.values() if checkpoint.streamed)
    read = f" {size(streamed)} to read over the network at every reading of all weights," if streamed else ""
    totals = (
        f"{size(memory)} of {size(planner.machine.memory)} of memory, {size(missing)} to download,{read}"
        f" {size(kept)} of {size(available_disk(planner.outputs))} of disk, about"
        f" {duration(sum(stage.seconds for stage in stages))} without the download"
    )
    console.print(
        f"{'does not fit' if problems else 'fits'}: {totals}; nothing was started",
        highlight=False,
        soft_wrap=True,
    )
    return problems


def _file_table(files: Mapping[str, object]) -> object:
    from rich.table import Table

    from weightgeom.bases.hub import CheckpointFiles

    table = Table("checkpoint", "files", "size", "in the cache", "to download", title="files")
    for checkpoint in files.values():
        assert isinstance(checkpoint, CheckpointFiles)
        cached = f"{checkpoint.cached} files, {size(checkpoint.cached_size)}"
        cached = "read by ranges" if checkpoint.streamed else cached
        table.add_row(
            checkpoint.location,
            str(checkpoint.count),
            size(checkpoint.size),
            cached,
            size(checkpoint.missing),
        )
    return _right_aligned(table)


def _stage_table(stages: Sequence[PlannedStage], jobs: int) -> object:
    """The stages, with equal stages of several jobs in one row."""
    from rich.table import Table

    kinds: dict[tuple[str, str], list[PlannedStage]] = {}
    for stage in stages:
        kinds.setdefault((stage.name, stage.work), []).append(stage)
    table = Table("stage", "work", "time", "memory", "disk", title="stages")
    if jobs > 1:
        table.title = f"stages of {jobs} jobs; shared stages run once"
        table.add_column("runs")
    for (name, work), equal in kinds.items():
        cells = [
            work,
            duration(sum(stage.seconds for stage in equal)),
            size(max(stage.memory for stage in equal)),
            size(sum(stage.disk for stage in equal)),
        ]
        table.add_row(name, *cells, *([str(len(equal))] if jobs > 1 else []))
    return _right_aligned(table)


def _right_aligned(table):  # pyright: ignore
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _memory_problems(stages: Sequence[PlannedStage], planner: Planner) -> Iterator[str]:
    """The stages that exceed the free memory, each name once."""
    names = set()
    for stage in stages:
        if stage.memory > planner.machine.memory and stage.name not in names:
            names.add(stage.name)
            free = f"{size(stage.memory)} of memory where {size(planner.machine.memory)} are free"
            shared = f" for each of {planner.parallel} jobs at a time" if planner.parallel > 1 else ""
            remedy = f"add {stage.remedy}" if stage.remedy else "take a smaller model or another machine"
            fewer = int(planner.parallel * planner.machine.memory / stage.memory)
            if fewer and planner.parallel > 1:
                remedy = f"add hydra.launcher.array_parallelism={fewer}"
            yield f"{stage.name} takes {free}{shared}: {remedy}"


def _disk_problems(
    outputs: Path, missing: float, kept: float, stages: Sequence[PlannedStage]
) -> Iterator[str]:
    """The disks that are too small for the download or for the outputs."""
    cache = _cache()
    free, cache_free = available_disk(outputs), available_disk(cache)
    same_disk = existing(outputs).stat().st_dev == existing(cache).stat().st_dev
    if missing > cache_free and not same_disk:
        yield (
            f"the download takes {size(missing)} and {cache} has {size(cache_free)}:"
            " set HF_HOME to another disk"
        )
    needed = kept + (missing if same_disk else 0.0)
    if needed > free:
        states = max((stage.temporary_disk for stage in stages), default=0.0)
        remedy = "set outputs= (and HF_HOME, for the download) to another disk"
        if states and needed - states <= free:
            remedy = "add training.save_every=null, which keeps no states to resume from"
        disk = f"{existing(outputs)} has {size(free)}"
        yield f"download and checkpoints take {size(needed)} and {disk}: {remedy}"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def size(count: float) -> str:
    """A number of bytes with its unit, in powers of ten as on the hub."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB" if count else "-"
