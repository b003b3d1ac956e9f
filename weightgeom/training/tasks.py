"""The tasks of a scheduler's job that hold the processes of its trainings, one each.

The first task does the run. It opens a door, through which every other one comes in; that starts a process
of a training whenever the first asks for it, follows it, and passes on its messages. If either ends, the
other notices at once.
"""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait

from weightgeom.training.worker import Place, Worker, started

LOCAL = "127.0.0.1"
PARTING = 10.0  # seconds that a process may take to end by itself once it has finished
PATIENCE = 300.0  # seconds for which the tasks of a job wait for each other at its start


@dataclass(frozen=True)
class Task:
    """One of a job's tasks: its rank among all and among those on its node."""

    rank: int
    number: int
    local_rank: int
    local_number: int
    node: str
    threads: int | None = None  # of its process of a training; None: an equal part of the node's

    def __str__(self) -> str:
        return f"task {self.rank} on {self.node}"


@dataclass(frozen=True)
class Door:
    """Where the first task is found, and the key to come in with."""

    address: str
    port: int
    key: bytes


@dataclass
class Tasks:
    """The tasks of this job, as the first one knows them; the others by rank, once they have come in."""

    own: Task
    door: Door
    joined: dict[int, tuple[Task, Connection]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def by_rank(self) -> list[Task]:
        """All tasks; waits for the others.

        Raises:
            TimeoutError: if one does not come in within PATIENCE seconds.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.joined) == self.own.number - 1, PATIENCE):
                missing = next(rank for rank in range(1, self.own.number) if rank not in self.joined)
                raise TimeoutError(
                    f"task {missing} of {self.own.number} of this job did not come in within {PATIENCE:.0f}"
                    " s to hold a process of the training: its log is that of this task with its number"
                )
        return [self.own, *(self.joined[rank][0] for rank in range(1, self.own.number))]

    def asked(self, place: Place, work: bytes) -> Worker:
        """A process that does the pickled `work` in the task of its rank."""
        task, connection = self.joined[place.rank]
        with suppress(OSError):  # a task that is gone has died, as reading from it will show
            connection.send((place, work))
        return Worker(place.rank, _Elsewhere(connection), connection, str(task))

    def welcome(self, listener: Listener) -> None:
        """Let the other tasks in, until the listener is closed."""
        while True:
            try:
                connection = listener.accept()
                task: Task = connection.recv()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # somebody else
            except OSError:
                return
            with self.changed:
                self.joined[task.rank] = task, connection
                self.changed.notify_all()


@dataclass
class _Elsewhere:
    """A process in another task, with the members of `multiprocessing.Process` that are used here.

    To end it is to close the connection, at which its task ends with it.
    """

    sentinel: Connection
    exitcode: int | None = None

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.sentinel.close()

    def join(self) -> None:
        """Its task sees to it."""


_JOB: ContextVar[Tasks | None] = ContextVar("tasks of this job", default=None)


def tasks_of_this_job() -> Tasks | None:
    """The tasks between which this job's trainings are divided; None if it is a single one."""
    return _JOB.get()


@contextmanager
def gathered(own: Task, address: str) -> Iterator[Door]:
    """The first task's part: within it, trainings have one process in each task of the job.

    Other nodes find it at `address`; that of LOCAL is open to processes of this node alone.
    """
    place = (LOCAL if address == LOCAL else "", 0)
    key = secrets.token_bytes(32)
    with Listener(place, "AF_INET", backlog=own.number, authkey=key) as listener:
        tasks = Tasks(own, Door(address, int(listener.address[1]), key))
        threading.Thread(target=tasks.welcome, args=(listener,), daemon=True).start()
        before = _JOB.set(tasks)
        try:
            yield tasks.door
        finally:
            _JOB.reset(before)
            for _, connection in tasks.joined.values():
                connection.close()


def attend(door: Door, task: Task) -> None:
    """Another task's part: hold a process of each training, until the first task ends."""
    with suppress(EOFError, ConnectionError), Client((door.address, door.port), authkey=door.key) as first:
        first.send(task)
        while True:
            place, work = first.recv()
            _follow(started(place, work), first)


def _follow(worker: Worker, first: Connection) -> None:
    """Pass on the messages of a process to the first task, whose end is the process's."""
    try:
        while not worker.ended:
            if first in wait([first, worker.connection, worker.process.sentinel]):
                raise EOFError("the first task sends nothing meanwhile: it has ended")
            for message in worker.messages():
                first.send(message)
        if worker.died:
            first.send(("died", worker.process.exitcode))
        if worker.finished:
            worker.process.join(PARTING)
    finally:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
