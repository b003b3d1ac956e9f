"""The ratio expected from the base's moments against the trained one, over objectives, data and optimizers.

    .venv/bin/python benchmarks/mechanism.py
    .venv/bin/python benchmarks/mechanism.py --d_model 64 --pretraining 300 --prompts 768  # a smaller world

Trains the embedded base by cross-entropy on the chosen responses and by DPO, on each preference of the world
but for one copy (`style` and `facts_style` have the same chosen responses), by every optimizer. With four
layers these are 40 points of the write pathway and 80 of the read pathway for each optimizer. Prints
correlation and root mean squared difference of logarithms, with 95 % intervals over trainings, and writes
`mechanism.csv`, `agreement.csv` and the figure `mechanism.png` to `outputs/mechanism`. The rate of SGD is
low, as the forecast is of a step from the base: at 0.05 an update of 32 steps is no longer one. A quarter
of an hour on one core.
"""

# pyright: reportGeneralTypeIssues=false

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from weightgeom.analysis.forecasts import agreement
from weightgeom.bases.tiny import Tiny
from weightgeom.data.world import World
from weightgeom.figures import base as figures
from weightgeom.interfaces import Log, Objective, Setting
from weightgeom.models.loading import load, load_network, load_tokenizer
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.moments import EXPECTED as OF_ANY
from weightgeom.probes.moments import Moments
from weightgeom.table import tabulate
from weightgeom.training.config import Training
from weightgeom.training.fit import fit, saved_trajectory
from weightgeom.training.optimizers import OPTIMIZERS
from weightgeom.trajectory import Base, Trajectory

OUTPUTS = Path("outputs/mechanism")
OBJECTIVES: dict[str, Objective] = {"ce": CE("chosen"), "dpo": DPO()}
RUNS = [("ce", "style"), ("ce", "facts"), ("dpo", "style"), ("dpo", "facts"), ("dpo", "facts_style")]
EXPECTED = [name for name in OF_ANY if name != "forecast_adapter"]  # whole matrices are trained
log = logging.getLogger(__name__)


def stage(
    name: str, specification: Mapping[str, object], work: Callable[[Path, Log], None], steps: int = 0
) -> Path:
    """The directory that `work` fills, kept for the next time."""
    key = sha256(json.dumps(specification, sort_keys=True, default=str).encode()).hexdigest()[:12]
    directory = OUTPUTS / f"{name}-{key}"
    if not (directory / "DONE").exists():
        log.warning("%s", directory)
        directory.mkdir(parents=True, exist_ok=True)
        work(directory, lambda metrics, step: None)
        (directory / "DONE").touch()
    return directory


def points(
    base: Base,
    objective: str,
    preference: str,
    trainings: Sequence[Training],
    prompts: int,
    seed: int,
) -> pd.DataFrame:
    """The tables of the probe `moments` of trainings that differ in the optimizer alone, at their last steps.

    The moments at the base are those of all of them, and taken once.
    """
    examples = World(preference=preference).examples()  # pyright: ignore[reportArgumentType]
    options = {"name": f"{objective} {preference}", "seed": seed, "device": "cpu", "start": base.directory}
    of = {"base": str(base.directory), "objective": objective, "preference": preference, "seed": seed}

    def train(training: Training) -> Trajectory:
        def work(directory: Path, log_metrics: Log) -> None:
            network, tokenizer = load_network(base.directory), load_tokenizer(base.directory)
            arguments = (OBJECTIVES[objective], network, tokenizer, examples, training, directory)
            fit(*arguments, log_metrics=log_metrics, **options)

        directory = stage("training", {**of, "training": training}, work)
        return saved_trajectory(directory, "training", base.directory)

    trained = {training.optimizer: train(training) for training in trainings}

    def measure(directory: Path, log_metrics: Log) -> None:
        model = load(base.directory, "cpu")
        start = model.params(base.directory)
        given = (examples, seed, OBJECTIVES[objective], trainings[0])
        probe = Moments(prompts=prompts, resamples=0)
        measurement = probe.measurement(Setting(model, start, start, False, *given))
        tables = []
        for optimizer, trajectory in trained.items():
            rows = measurement(model.params(trajectory.steps[trajectory.last]))
            table = tabulate([{"step": trajectory.last, **row} for row in rows])
            named = table["quantity"].isin(["measured_ratio", OPTIMIZERS[optimizer].forecast])
            tables.append(table.assign(optimizer=optimizer, treatment=np.where(named, optimizer, "")))
        pd.concat(tables).to_parquet(directory / "moments.parquet")

    directory = stage("moments", {**of, "trainings": trainings, "prompts": prompts}, measure)
    return pd.read_parquet(directory / "moments.parquet").assign(run=f"{objective} {preference} {seed}")


def main() -> None:
    """Train, measure, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trainings")
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--pretraining", type=int, default=600, help="steps of the base")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2048, help="for the moments")
    parser.add_argument("--rates", type=json.loads, default={}, help='by optimizer, such as {"sgd": 0.1}')
    asked = parser.parse_args()
    rates = {"adamw": 5e-5, "sgd": 0.005, "lion": 2e-5, "muon": 5e-5, **asked.rates}
    pretraining = Training(
        steps=asked.pretraining, learning_rate=3e-3, schedule="cosine", weight_decay=0.01, max_length=96
    )
    world = World()
    tiny = Tiny(corpus="world", d_model=asked.d_model, d_mlp=4 * asked.d_model, pretraining=pretraining)
    base = tiny.prepare(stage, world.examples(), world, "cpu")
    trainings = [
        Training(steps=asked.steps, optimizer=optimizer, learning_rate=rates[optimizer])
        for optimizer in asked.optimizers
    ]
    tables = [points(base, *run, trainings, asked.prompts, seed) for run in RUNS for seed in asked.seeds]
    table = pd.concat(tables, ignore_index=True)
    quantities = [f"{name}_ratio" for name in ("measured", *EXPECTED)]
    place = ["optimizer", "run", "role", "matrix", "layer"]
    wide = table[table["quantity"].isin(quantities)].pivot(index=place, columns="quantity", values="value")
    wide = wide.rename(columns=lambda name: name.removesuffix("_ratio")).reset_index()
    wide.to_csv(OUTPUTS / "mechanism.csv", index=False)
    agreements = pd.concat([
        agreement(part, EXPECTED).assign(optimizer=optimizer, pathway=role)
        for (optimizer, role), part in wide.groupby(["optimizer", "role"], sort=False)
    ])  # fmt: skip
    agreements.to_csv(OUTPUTS / "agreement.csv", index=False)
    shown = Table("optimizer", "pathway", "expected", "points", "correlation", "log-RMSE")
    for row in agreements.to_dict("records"):
        values = [
            f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
            for name in ("correlation", "log_rmse")
        ]
        shown.add_row(row["optimizer"], row["pathway"], row["expected"], str(row["points"]), *values)
    Console(width=110).print(shown)
    table["run"] = table["optimizer"] + " " + table["run"]
    figures.save(figures.expected_and_measured(table), OUTPUTS / "mechanism.png", OUTPUTS / "mechanism.pdf")


if __name__ == "__main__":
    main()
