"""One process of a training, from its start to its end, in which it calls its work once.

Every process is a new one, whose parent follows its messages. The module imports little: in the other tasks
of a scheduler's job, the parent waits with it for hours.
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
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from weightgeom.interruption import no_request

Message = tuple[Any, ...]  # its kind, and the content
# They reach all processes of a terminal or of a job, but are the parent's to handle: workers block them.
SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR2, signal.SIGXCPU),
)


@dataclass(frozen=True)
class Place:
    """The place of a process in its training: all that it needs to know before its work."""

    rank: int
    number: int
    local_rank: int  # among the processes on its node
    local_number: int
    address: str  # of the first process's parent, which holds the store
    port: int
    device: str
    threads: int
    level: int  # of log lines
    trusted: Path | None  # a directory whose own code may run


@dataclass
class Worker:
    """A process as its parent sees it."""

    rank: int
    process: Any  # with the members of `multiprocessing.Process`
    connection: Connection
    task: str | None = None  # the task of a scheduler's job that has started it; None for this one
    failed: "tuple[float, BaseException] | None" = None  # when, in seconds since 1970
    finished: bool = False
    died: bool = False  # ended without a word

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be heard of it."""
        return self.finished or self.died or self.failed is not None

    def messages(self) -> Iterator[Message]:
        """The messages that have arrived; mutates this worker where one, or none, is the last."""
        gone = not self.process.is_alive()  # and its last message may wait
        while not self.ended:
            try:
                if not self.connection.poll():
                    break
                message = self.connection.recv()
            except (EOFError, OSError):
                gone = True
                break
            if message[0] == "failed":
                self.failed = message[1:]
            elif message[0] == "died":
                self.died, self.process.exitcode = True, message[1]
            self.finished = message[0] == "finished"
            yield message
        if gone and not self.ended:
            self.process.join()
            self.died = True


def started(place: Place, work: bytes) -> Worker:
    """A new process that does the pickled `work`; it blocks SIGNALS from its first moment on."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks, and no use of a GPU
    ours, theirs = context.Pipe()
    process = context.Process(target=_live, args=(place, theirs, work), name=f"training-{place.rank}")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # once, which unblocks SIGINT and SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return Worker(place.rank, process, ours)


def _live(place: Place, connection: Connection, pickled: bytes) -> None:
    import torch

    threading.Thread(target=_follow_parent, daemon=True).start()
    sender = _Sender(connection)
    try:
        _join(place, sender)
        work = pickle.loads(pickled)
        first = place.rank == 0
        work(sender.metrics if first else _no_metrics, sender.request if first else no_request)
        torch.distributed.barrier()  # none leaves while another still needs it
        torch.distributed.destroy_process_group()
        sender.send("finished")
    except BaseException as error:
        sender.send("failed", time.time(), _portable(error))
        os._exit(1)  # at once: the group of processes is broken, and loaders of batches end by themselves


def _join(place: Place, sender: "_Sender") -> None:
    """Join the group of processes; changes the environment, the logging and the threads of this one."""
    import torch

    from weightgeom.models.language_model import trust

    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(place.number),
        LOCAL_WORLD_SIZE=str(place.local_number),
        MASTER_ADDR=place.address,
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
        # A task that a scheduler has bound to its own GPU sees that one alone; accelerate counts as here.
        index = place.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", index))
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
