"""Probes of many checkpoints, divided: each worker, a process here or a job of a sweep, measures a piece."""

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from logging.handlers import QueueHandler, QueueListener
from multiprocessing.connection import wait
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from runners.pipeline.foresight import against, forecast
from runners.pipeline.logged_stages import Foretold, Stages
from runners.pipeline.progress import Foreseen
from weightgeom.bases.remote import temporary_directories
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

if TYPE_CHECKING:
    from runners.pipeline.experiment import Experiment, Make

log = logging.getLogger(__name__)
Identified = tuple[Trajectory, str]
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}  # which the run acts on, and not its workers


def steps_of(steps: Sequence[int], number: int, workers: int) -> list[int]:
    """The steps of worker `number`, in order and one after the other; workers differ by at most one step."""
    start, end = (len(steps) * edge // workers for edge in (number, number + 1))
    return list(steps)[start:end]


def stages_of(
    run: "Experiment",
    make: "Make",
    base: Base,
    trajectories: Sequence[Identified],
    examples: Examples,
    number: int,
) -> Iterator[Callable[[], object]]:
    """The makers of a worker's stages: its pieces, and its comparisons of neighbouring stages of a chain.

    Of these it has the ones whose later stage is in its piece.
    """
    for trajectory, identity in trajectories:
        measured = run.measured(make, base, trajectory, identity, examples, run.suffix(trajectory, base))
        steps = steps_of(list(trajectory.steps), number, run.workers)
        for name, probe in run.probes.items():
            if steps and measured.unmade(name, probe):
                yield partial(measured.piece, name, probe, steps)
    if base.trajectory is None:
        return
    order = list(base.trajectory.steps)
    mine = steps_of(order, number, run.workers)
    for step, pair, names in zip(order[1:], base.pairs, pairwise(base.trajectory.stages), strict=False):
        if step in mine and pair.trajectory is not None:
            measured = run.measured(make, pair, pair.trajectory, pair.identity, examples, against(*names))
            for name, probe in run.probes.items():
                if probe.declaration.compares:
                    yield partial(measured.table, name, probe)


def foreseen_of(
    run: "Experiment", base: Base, trajectories: Sequence[Identified], examples: Examples, number: int
) -> list[Foreseen]:
    """The stages of a worker as they are on disk; nothing is made."""
    stages: list[Foreseen] = []
    look = partial(forecast, run.outputs, stages, False)
    for make_stage in stages_of(run, look, base, trajectories, examples, number):
        with suppress(Foretold):
            make_stage()
    return stages


def measure_here(
    run: "Experiment", base: Base, trajectories: Sequence[Identified], examples: Examples
) -> None:
    """Make the pieces that no worker has made, each in a process of its own, as many at a time as there are
    processors.

    Raises:
        ChildProcessError: if a process died, such as of a lack of memory.
        BaseException: the first error of a worker.
    """
    foreseen = {
        number: foreseen_of(run, base, trajectories, examples, number) for number in range(run.workers)
    }
    missing = [number for number, stages in foreseen.items() if not all(stage.made for stage in stages)]
    if not missing:
        return
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    processes = min(len(missing), cores)
    log.info(
        "%d of %d pieces are still to be measured: now, in %d processes", len(missing), run.workers, processes
    )
    alone = replace(run, interruption=None)  # its signals are this process's
    with _workers(processes, max(1, threads // processes)) as pool:
        for done in [pool.submit(_work, alone, examples, number) for number in missing]:
            try:
                done.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a process that measures a piece was killed, as by a lack of memory: the same command"
                    " goes on behind the checkpoints that are measured; give it a smaller probe.workers"
                ) from error


@contextmanager
def _workers(processes: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """New processes, which end with the block and with this process; their log lines appear here."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks, and no use of a GPU
    lines: Any = context.Queue()
    listener = QueueListener(lines, _Once())
    others = set(multiprocessing.active_children())
    begin = (lines, logging.getLogger().level, threads)
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=begin)
    # Processes start with the signals blocked that this one has blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for _ in range(processes):
            pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    listener.start()
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        listener.stop()
        lines.close()


class _Once(logging.Handler):
    """Passes each line on once: workers warn of the same things."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and record.getMessage() not in self.seen:
            self.seen.add(record.getMessage())
            logging.getLogger(record.name).handle(record)


def _begin(lines: Any, level: int, threads: int) -> None:
    """A worker's beginning: its log lines go to the run, and it ends with the run."""
    Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    logging.basicConfig(level=level, handlers=[QueueHandler(lines)], force=True)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(run: "Experiment", examples: Examples, number: int) -> None:
    def make(prefix: str, code: str, of: str = "") -> Stages:
        return Stages(run.outputs, None, prefix, code, run.verify, of=of)

    with temporary_directories():
        base = run.prepared(make, examples)
        trajectories = list(run.trajectories(make, base, examples))
        for make_stage in stages_of(run, make, base, trajectories, examples, number):
            make_stage()
