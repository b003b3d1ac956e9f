"""Runs that write a record and publish it, each in a process of its own; MLflow is imported once for all."""

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runners.signals import terminations_as_exceptions
from runners.tracking.publisher import Publisher
from runners.tracking.record import Record

DATA: Any = {"name": "world", "digest": "ab" * 16, "source": "generated", "context": "training"}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mlflow", "mlflow.store.tracking.sqlalchemy_store"])


def new(directory: Path, uri: str, **changes: Any) -> Record:
    """A record with a little of everything."""
    asked: dict[str, Any] = {
        "experiment": "study",
        "name": directory.name,
        "params": {"beta": 0.1, **{f"training.key{n}": n for n in range(120)}},  # more than one batch
        "tags": {"note": "a test"},
        "inputs": [DATA],
        "tracking_uri": uri,
    }
    return Record.create(directory, **(asked | changes))


def work(record: Record, steps: int, pause: float = 0.0) -> float:
    """Log `steps` steps of three metrics and make a table; the seconds of the slowest step but its pause."""
    slowest = 0.0
    for step in range(steps):
        began = time.perf_counter()
        record.log({"train/loss": 1 / (step + 1), "train/accuracy": step / steps}, step)
        record.log({"rsf_by_layer/q": float("nan") if step % 7 == 0 else float(step)}, step)
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(pause)
    record.artifact("tables/rsf.csv").write_text("step\n" + "1\n" * steps)
    record.artifact("config.yaml").write_text("beta: 0.1\n")
    return slowest


def write(directory: Path, uri: str, steps: int, parent: Path | None, log: Path) -> None:
    """A whole run, with what it says in the file `log`."""
    logging.basicConfig(filename=log, level=logging.WARNING)
    record = new(directory, uri, parent=parent)
    with terminations_as_exceptions(), Publisher(directory, uri, interval=0.1, patience=150), record:
        work(record, steps, pause=0.02)


def write_until_told(directory: Path, uri: str, end: str) -> None:
    """A run that raises, or waits for a signal."""
    record = new(directory, uri)
    with terminations_as_exceptions(), Publisher(directory, uri, interval=0.1), record:
        work(record, 20)
        if end == "exception":
            raise RuntimeError("the loss is not finite")
        time.sleep(300)


@contextmanager
def processes() -> Iterator[Callable[..., Any]]:
    """Starts a function in a process; those that are left are killed."""
    started: list[Any] = []

    def start(target: Callable[..., None], *arguments: Any) -> Any:
        started.append(PROCESSES.Process(target=target, args=arguments))
        started[-1].start()
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.join()
