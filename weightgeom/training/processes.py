"""A training on several processes: started, listened to, and ended together.

The calling process keeps the record and the signals; it holds no weights. Its workers run `fit`, each on its
part of every batch, and the first of them sends its metrics and log lines. They are processes of this
machine, or one is in each task of a scheduler's job.
"""

import logging
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightgeom.interfaces import Log, Objective
from weightgeom.interruption import Request, no_request
from weightgeom.models.language_model import trusted
from weightgeom.models.loading import load_network, load_tokenizer
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit, saved_trajectory
from weightgeom.training.tasks import LOCAL, Tasks, tasks_of_this_job
from weightgeom.training.worker import Place, Worker, started
from weightgeom.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
GRACE = 5.0  # seconds for which the other processes may end by themselves once one has failed


def fit_on_processes(
    objective: Objective,
    load: "Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]",
    examples: Examples,
    training: Training,
    directory: Path,
    *,
    name: str,
    seed: int,
    device: str,
    log_metrics: Log,
    start: Path | None = None,
    request: Request = no_request,
) -> Trajectory:
    """`fit` on `training.processes` processes; `load` makes the network and its tokenizer in each.

    On one, it is `fit` in this process. Otherwise the workers are new processes, which a signal to this one
    does not reach: its end ends them. All metrics and requests pass through this process.

    Raises:
        ValueError: if a scheduler's job has several tasks, but not as many.
        ChildProcessError: if a process died, such as of a lack of memory.
        BaseException: the error of the process that failed first, as `fit` raises it.
    """
    named = {"name": name, "seed": seed, "device": device, "start": start}
    work = partial(_fitted, objective, load, examples, training, directory, named)
    if training.processes == 1:
        work(log_metrics, request)
    else:
        run_on_processes(work, training.processes, device, log_metrics, request, trusted_directory=start)
    return saved_trajectory(directory, name, start)


def check_gpus(number: int) -> None:
    """Raise ValueError if this machine has no GPU for each of a training's processes.

    A task of a scheduler's job may see its own GPU alone.
    """
    count, tasks = torch.cuda.device_count(), tasks_of_this_job()
    if tasks is not None and number > 1:
        here = tasks.own.local_number
        if 1 < count < here:
            raise ValueError(
                f"{here} tasks on a node take {here} GPUs, one for each, and torch sees {count}: set"
                f" hydra.launcher.gpus_per_node={here}"
            )
    elif number > count:
        raise ValueError(
            f"training.processes={number} takes {number} GPUs, one for each, and torch sees {count}: set"
            f" training.processes={count}"
        )


def load_on(directory: Path, device: str, shard: bool) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The network of a checkpoint on `device`, and its tokenizer.

    A network to be sharded stays on the CPU, from where each process puts its part on the device.
    """
    network = load_network(directory)
    if not shard:
        network = network.to(device)  # pyright: ignore[reportArgumentType]
    return network, load_tokenizer(directory)


def _fitted(
    objective: Objective,
    load: "Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]",
    examples: Examples,
    training: Training,
    directory: Path,
    named: dict[str, Any],
    log_metrics: Log,
    request: Request,
) -> None:
    network, tokenizer = load()
    fit(
        objective,
        network,
        tokenizer,
        examples,
        training,
        directory,
        **named,
        log_metrics=log_metrics,
        request=request,
    )


def run_on_processes(
    work: Callable[[Log, Request], None],
    number: int,
    device: str,
    log_metrics: Log,
    request: Request,
    trusted_directory: Path | None,
) -> None:
    """`work` on a number of new processes, each of which calls it; the code in a directory may be trusted."""
    tasks = tasks_of_this_job()
    address = LOCAL if tasks is None else tasks.door.address
    # Held by this process, so that no other process can take the port in between.
    store = torch.distributed.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    code = trusted_directory if trusted_directory and trusted(trusted_directory) else None
    make = partial(
        Place,
        number=number,
        address=address,
        port=store.port,
        device=device,
        level=logging.getLogger().level,
        trusted=code,
    )
    pickled = pickle.dumps(work)
    workers: list[Worker] = []
    log.info("training on %d processes%s", number, "" if tasks is None else ", one in each task of the job")
    try:
        for place in _places(make, number, tasks):
            if tasks is None or place.rank == 0:
                workers.append(started(place, pickled))
            else:
                workers.append(tasks.asked(place, pickled))
        while not all(worker.finished for worker in workers):
            _listen(workers, log_metrics, request, None)
            if any(worker.failed or worker.died for worker in workers):
                _end(workers, log_metrics, request)
    finally:
        # Another task whose process has finished waits for the next training.
        left = [worker for worker in workers if worker.task is None or not worker.finished]
        for worker in left:
            worker.process.kill()
        for worker in left:
            worker.process.join()
            worker.connection.close()


def _places(make: Callable[..., Place], number: int, tasks: Tasks | None) -> Iterator[Place]:
    """The places of a training's processes."""
    threads = torch.get_num_threads()
    if tasks is None:
        for rank in range(number):
            share = max(1, threads // number)
            yield make(rank=rank, local_rank=rank, local_number=number, threads=share)
        return
    if number != tasks.own.number:
        raise ValueError(
            f"a training on {number} processes cannot have one in each of this job's {tasks.own.number}"
            f" tasks: set its processes={tasks.own.number}, or hydra.launcher.tasks_per_node and nodes"
        )
    for task in tasks.by_rank():
        part = max(1, threads // task.local_number)
        share = part if task.threads is None else min(threads, task.threads)
        yield make(rank=task.rank, local_rank=task.local_rank, local_number=task.local_number, threads=share)


def _listen(workers: Sequence[Worker], log_metrics: Log, request: Request, patience: float | None) -> None:
    """Act on the messages that have arrived; waits for one, or for a process's end."""
    running = [worker for worker in workers if not worker.ended]
    wait({of for worker in running for of in (worker.connection, worker.process.sentinel)}, patience)
    for worker in running:
        for kind, *content in worker.messages():
            if kind == "metrics":
                log_metrics(*content)
            elif kind == "request":
                answer = request()
                with suppress(ConnectionError):  # it has died since
                    worker.connection.send(answer)
            elif kind == "log":
                logging.getLogger(content[0].name).handle(content[0])


def _end(workers: Sequence[Worker], log_metrics: Log, request: Request) -> None:
    """Raise the error that the training ended with.

    A process whose partner died fails as well, some time after it: a process that died comes first.
    """
    end = time.monotonic() + GRACE
    while (left := end - time.monotonic()) > 0 and not all(worker.ended for worker in workers):
        _listen(workers, log_metrics, request, left)
    for worker in workers:
        if worker.died:
            raise ChildProcessError(_death(worker, len(workers)))
    raise min((worker.failed for worker in workers if worker.failed), key=lambda failed: failed[0])[1]


def _death(worker: Worker, number: int) -> str:
    """The sentence about a process that ended without a word."""
    code = worker.process.exitcode
    who = f"process {worker.rank + 1} of {number} of the training"
    again = "the same command" if worker.task is None else "`weightgeom sweep resubmit`"
    if worker.task is not None:
        who = f"{who} ({worker.task})"
    if code is None:
        how = "ended with its task, as by a kill or the loss of its node"
    elif code >= 0:
        how = f"ended with exit code {code}"
    else:
        how = f"was killed by {signal.Signals(-code).name}"
        how += ", as by a lack of memory" if code == -signal.SIGKILL else ""
    return (
        f"{who} {how}; the others were ended, and {again} resumes from the newest saved state, if there is"
        " one (training.save_every)"
    )
