"""The cost of tracking: its share of a training step, and the time that many points take to publish.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/tracking.py

Trains the tiny model by DPO, the fastest step that we have and so the worst case, in turns of a few steps
with a record that is published live to a sqlite file, and without any. What the record and the publisher do
is measured by itself, as processor time of the thread that does it: the turns differ by less than what else
goes on here. Then 10,000 points of a finished record go to a store of their own. Targets: 3 %, 10 s.
"""

import argparse
import threading
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from runners.tracking.publisher import Publication
from runners.tracking.record import Record
from weightgeom.bases.tiny import Tiny
from weightgeom.data.world import World
from weightgeom.objectives.dpo import DPO
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed

POINTS, TURN = 10_000, 20  # steps


class TimedPublisher(threading.Thread):
    """Publishes as `Publisher` does, every two seconds, and counts the processor time of its thread."""

    def __init__(self, publication: Publication) -> None:
        super().__init__(daemon=True)
        self.publication, self.seconds, self.end = publication, 0.0, threading.Event()

    def run(self) -> None:
        """Publish until `end` is set."""
        while not self.end.wait(2.0):
            before = thread_time()
            self.publication.publish(artifacts=False)
            self.seconds += thread_time() - before


class Tracked(TrainerCallback):
    """Logs every step of every other turn into a record, and takes the time of all steps."""

    def __init__(self, record: Record) -> None:
        self.record, self.times = record, {True: [], False: []}
        self.logging, self.began = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.began = perf_counter()

    def on_log(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any
    ) -> None:
        """Log a step, if it is the record's turn."""
        tracked = state.global_step // TURN % 2 == 1
        if tracked:
            before = thread_time()
            metrics = {f"train/{key}": value for key, value in logs.items() if isinstance(value, float)}
            self.record.log(metrics, state.global_step)
            self.logging += thread_time() - before
        if state.global_step > 5:
            self.times[tracked].append(perf_counter() - self.began)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("what", "measured", "target")
    with TemporaryDirectory() as place:
        for what, measured, target in [*step(Path(place), options.steps), points(Path(place))]:
            table.add_row(what, measured, target)
    Console().print(table)


def step(place: Path, steps: int) -> list[tuple[str, str, str]]:
    """The cost of tracking in a training step."""
    world = World()
    tokenizer = world.tokenizer()
    record = created(place, "training")
    publication = Publication(record, f"sqlite:///{place}/training.db")
    publisher, tracked = TimedPublisher(publication), Tracked(record)
    torch.manual_seed(0)
    network = transformers.GPTNeoXForCausalLM(Tiny()._config(len(tokenizer), tokenizer.get_vocab()["<eos>"]))
    arguments = Training(steps=steps).arguments(place / "trainer", 0, "cpu") | {
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    trainer = DPO().trainer(network, tokenizer, world.examples(), arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(tracked)
    publisher.start()
    with outdated_name_allowed():
        trainer.train()
    publisher.end.set()
    publisher.join()
    count = len(tracked.times[True])
    typical = median(tracked.times[False])
    cost = (tracked.logging + publisher.seconds) / count
    share = f"{1000 * cost:.2f} of {1000 * typical:.1f} ms: {100 * cost / typical:.2f} %"
    turns = f"{median(tracked.times[True]) / typical:.3f}"
    return [
        (f"record and publisher, processor time a step, over {count} steps", share, "3 %"),
        ("median step in tracked turns, over that in the others", turns, "1.03"),
    ]


def points(place: Path) -> tuple[str, str, str]:
    """The time that a finished record of many points takes to publish."""
    uri = f"sqlite:///{place}/points.db"
    with created(place, "points") as record:
        for number in range(POINTS // 10):
            record.log({f"train/{key}": float(number) for key in "abcdefghij"}, number)
    publication = Publication(record, uri)  # which makes the store, the cost of the first run alone
    began = perf_counter()
    publication.publish(artifacts=True)
    return f"publishing {POINTS} points", f"{perf_counter() - began:.2f} s", "10 s"


def created(place: Path, name: str) -> Record:
    """An empty record."""
    asked: dict[str, Any] = {"params": {}, "tags": {}, "inputs": [], "tracking_uri": "sqlite:///none"}
    return Record.create(place / name, experiment="benchmark", name=name, **asked)


if __name__ == "__main__":
    main()
