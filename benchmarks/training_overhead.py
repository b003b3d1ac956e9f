"""Time of a step through `weightgeom.training.fit.fit`, logging live into a record, over TRL's trainer alone.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/training_overhead.py
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/training_overhead.py --save-every 10 --log-gradients

Same data, seed and tiny model, in turns; the median of all steps, so that saving a checkpoint at a few of
them does not count, and the total with all of that. On a core that others use, too, look at the median of
the process's CPU time. Two minutes on an idle core. Target of the medians: 1.05 at most.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from runners.pipeline.logged_stages import Stages
from runners.tracking.record import Record
from weightgeom.bases.tiny import Tiny
from weightgeom.data.world import World
from weightgeom.interfaces import Log, Objective
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit, outdated_name_allowed


class Clock(TrainerCallback):
    """Takes the time, and the CPU time of the process, at the beginning of every step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.times.append((perf_counter(), process_time()))

    def steps(self) -> list[tuple[float, float]]:
        """Seconds from the beginning of each step to that of the next, without the first."""
        pairs = zip(self.times[1:], self.times[2:], strict=False)
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


class Timed:
    """An objective whose trainer has a clock."""

    def __init__(self, objective: Objective, clock: Clock) -> None:
        self.objective, self.clock = objective, clock
        self.first_loss = objective.first_loss
        self.check, self.scored, self.total_loss = objective.check, objective.scored, objective.total_loss

    def trainer(
        self,
        network: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> transformers.Trainer:
        """The objective's trainer with the clock."""
        trainer = self.objective.trainer(network, tokenizer, examples, arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.clock)
        return trainer


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--save-every", type=int)
    parser.add_argument("--log-gradients", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = World()
    examples = world.examples()
    training = Training(
        steps=options.steps, save_every=options.save_every, log_gradients=options.log_gradients
    )
    table = Table("objective", "TRL, ms", "fit, ms", "ratio", "CPU ratio", "ratio of totals", "steps each")
    for name, objective in {"ce": CE("chosen"), "dpo": DPO()}.items():
        times: dict[str, list[tuple[float, float]]] = {"trl": [], "fit": []}
        for turn in range(options.rounds):
            for way in sorted(times, reverse=bool(turn % 2)):
                with TemporaryDirectory() as directory:
                    times[way] += measured(way, objective, world, examples, training, Path(directory))
        wall, cpu = ({way: median(step[i] for step in steps) for way, steps in times.items()} for i in (0, 1))
        total = {way: sum(step[0] for step in steps) for way, steps in times.items()}
        ratios = [f"{of['fit'] / of['trl']:.3f}" for of in (wall, cpu, total)]
        milliseconds = [f"{1000 * wall[way]:.1f}" for way in ("trl", "fit")]
        table.add_row(name, *milliseconds, *ratios, str(len(times["fit"])))
    Console().print(table)


def measured(
    way: str, objective: Objective, world: World, examples: Examples, training: Training, directory: Path
) -> list[tuple[float, float]]:
    """Seconds, and those of the CPU, of each step of one training by the trainer itself or by `fit`."""
    tokenizer, clock = world.tokenizer(), Clock()
    torch.manual_seed(0)
    network = transformers.GPTNeoXForCausalLM(Tiny()._config(len(tokenizer), tokenizer.get_vocab()["<eos>"]))
    timed = Timed(objective, clock)
    if way == "trl":
        plain = Training(steps=training.steps)
        trainer = timed.trainer(network, tokenizer, examples, plain.arguments(directory, 0, "cpu"))
        with outdated_name_allowed():
            trainer.train()
        return clock.steps()

    def work(stage: Path, log_metrics: Log) -> None:
        options: Mapping[str, Any] = {"name": way, "seed": 0, "device": "cpu", "log_metrics": log_metrics}
        fit(timed, network, tokenizer, examples, training, stage, **options)

    asked: dict[str, Any] = {"params": {}, "tags": {}, "inputs": [], "tracking_uri": "sqlite:///none"}
    record = Record.create(directory / "record", experiment="benchmark", name=way, **asked)
    Stages(directory, record, "train", "code")("training", {}, work, training.steps)
    return clock.steps()


if __name__ == "__main__":
    main()
