"""A training on several processes of this machine: started, listened to, and ended together.

The calling process keeps the record and the signals; it holds no weights. Its workers run `fit`, each on its
part of every batch, and the first of them sends its metrics and log lines.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightgeom.interfaces import Log, Objective
from weightgeom.interruption import Request, no_request
from weightgeom.models.language_model import trust, trusted
from weightgeom.models.loading import load_network, load_tokenizer
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit, saved_trajectory
from weightgeom.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
GRACE = 5.0  # seconds for which the other processes may end by themselves once one has failed
LOCAL = "127.0.0.1"
# They reach all processes of a terminal or of a job, but are the parent's to handle: workers block them.
SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR2, signal.SIGXCPU),
)


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
    """Raise ValueError if this machine has no GPU for each of a training's processes."""
    if number > (count := torch.cuda.device_count()):
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


@dataclass
class _Worker:
    """A process as its parent sees it."""

    rank: int
    process: Any  # of a spawning context, which has a type of its own
    connection: Connection
    failed: "tuple[float, BaseException] | None" = None  # when, on a clock that all processes share
    finished: bool = False
    died: bool = False  # ended without a word

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be heard of it."""
        return self.finished or self.died or self.failed is not None


def run_on_processes(
    work: Callable[[Log, Request], None],
    number: int,
    device: str,
    log_metrics: Log,
    request: Request,
    trusted_directory: Path | None,
) -> None:
    """`work` on a number of new processes, each of which calls it; the code in a directory may be trusted."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks, and no use of a GPU
    # Held by this process, so that no other process can take the port in between.
    store = torch.distributed.TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // number)
    code = trusted_directory if trusted_directory and trusted(trusted_directory) else None
    workers: list[_Worker] = []
    log.info("training on %d processes", number)
    try:
        for rank in range(number):
            ours, theirs = context.Pipe()
            place = _Place(rank, number, store.port, device, threads, logging.getLogger().level, code)
            process = context.Process(target=_work, args=(place, theirs, work), name=f"training-{rank}")
            _start(process)
            theirs.close()
            workers.append(_Worker(rank, process, ours))
        while not all(worker.finished for worker in workers):
            _listen(workers, log_metrics, request, None)
            if any(worker.failed or worker.died for worker in workers):
                _end(workers, log_metrics, request)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()


def _start(process: Any) -> None:
    """Start a worker, which blocks SIGNALS from its first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(workers: Sequence[_Worker], log_metrics: Log, request: Request, patience: float | None) -> None:
    """Act on the messages that have arrived; waits for one, or for a process's end."""
    running = [worker for worker in workers if not worker.ended]
    wait([of for worker in running for of in (worker.connection, worker.process.sentinel)], patience)
    gone = [worker for worker in running if not worker.process.is_alive()]  # whose last message may wait
    for worker in running:
        while not worker.ended and (message := _message(worker)) is not None:
            kind, *content = message
            if kind == "metrics":
                log_metrics(*content)
            elif kind == "request":
                answer = request()
                with suppress(ConnectionError):  # it has died since
                    worker.connection.send(answer)
            elif kind == "log":
                logging.getLogger(content[0].name).handle(content[0])
            elif kind == "failed":
                worker.failed = content[0], content[1]
            else:
                worker.finished = True
    for worker in gone:
        worker.died = not worker.finished and worker.failed is None


def _message(worker: _Worker) -> tuple[Any, ...] | None:
    """The next message of a worker, None if there is none yet; notes, in the worker, that it died."""
    try:
        return worker.connection.recv() if worker.connection.poll() else None
    except (EOFError, ConnectionError):
        worker.process.join()
        worker.died = True
        return None


def _end(workers: Sequence[_Worker], log_metrics: Log, request: Request) -> None:
    """Raise the error that the training ended with.

    A process whose partner died fails as well, some time after it: a process that died comes first.
    """
    end = time.monotonic() + GRACE
    while (left := end - time.monotonic()) > 0 and not all(worker.ended for worker in workers):
        _listen(workers, log_metrics, request, left)
    for worker in workers:
        if worker.died:
            code = worker.process.exitcode
            how = (
                f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
            )
            memory = ", as by a lack of memory" if code == -signal.SIGKILL else ""
            raise ChildProcessError(
                f"process {worker.rank + 1} of {len(workers)} of the training {how}{memory}; the others were"
                " ended, and the same command resumes from the newest saved state, if there is one"
                " (training.save_every)"
            )
    raise min((worker.failed for worker in workers if worker.failed), key=lambda failed: failed[0])[1]


@dataclass(frozen=True)
class _Place:
    """What a worker needs to know before its work."""

    rank: int
    number: int
    port: int
    device: str
    threads: int
    level: int  # of log lines
    trusted: Path | None


def _work(place: _Place, connection: Connection, work: Callable[[Log, Request], None]) -> None:
    """The life of a worker."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    sender = _Sender(connection)
    try:
        _join(place, sender)
        first = place.rank == 0
        work(sender.metrics if first else _no_metrics, sender.request if first else no_request)
        torch.distributed.barrier()  # none leaves while another still needs it
        torch.distributed.destroy_process_group()
        sender.send("finished")
    except BaseException as error:
        sender.send("failed", time.monotonic(), _portable(error))
        os._exit(1)  # at once: the group of processes is broken, and loaders of batches end by themselves


def _join(place: _Place, sender: "_Sender") -> None:
    """Join the group of processes; changes the environment, the logging and the threads of this one."""
    rank, number = str(place.rank), str(place.number)
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=number,
        LOCAL_WORLD_SIZE=number,
        MASTER_ADDR=LOCAL,
        MASTER_PORT=str(place.port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is the parent's
        TQDM_DISABLE="1",  # the run shows its own progress
    )
    logging.basicConfig(level=place.level, handlers=[sender] if place.rank == 0 else [logging.NullHandler()])
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names each file of a state in parts
    if place.rank:
        warnings.simplefilter("ignore")  # the first process has the same
    if place.trusted is not None:
        trust(place.trusted)
    if place.device == "cuda":
        torch.cuda.set_device(place.rank)
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", place.rank))
    else:
        torch.set_num_threads(place.threads)
        torch.distributed.init_process_group("gloo")


class _Sender(logging.Handler):
    """Sends a worker's metrics, log lines and end to its parent."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.sending = threading.Lock()

    def send(self, *message: object) -> None:
        with self.sending:
            self.connection.send(message)

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.send("log", record)

    def metrics(self, metrics: Any, step: int) -> None:
        self.send("metrics", dict(metrics), step)

    def request(self) -> Any:
        with self.sending:
            self.connection.send(("request",))
            return self.connection.recv()


def _no_metrics(metrics: Any, step: int) -> None:
    """The first process sends them for all."""


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error as another process can raise it, with the worker's traceback as its note."""
    error.add_note("in a process of the training:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
