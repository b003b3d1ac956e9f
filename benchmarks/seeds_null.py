"""Trainings that differ in the seed alone: how often tests between trainings find a difference.

    .venv/bin/python benchmarks/seeds_null.py [--trainings 20] [--splits 2000]

Trains one embedded base by DPO with many seeds and takes the mean ratio of every matrix and pathway. Then the
trainings are split at random into two groups that are compared pair by pair, as if two objectives had made
them, and into five groups of four that stand for five objectives of the graded control. Prints the rate at
which each test rejects and its nominal rate, over all splits, matrices and pathways, and writes `ratios.csv`
to `outputs/seeds_null`. The splits share trainings, so that the rates have larger errors than their number
suggests. A quarter of an hour on one core.
"""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportArgumentType=false

import argparse
import logging
from math import log
from pathlib import Path

import mechanism
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from weightgeom.analysis.evidence import direction, equivalence, rank_correlation
from weightgeom.analysis.rules import LEVEL, MARGIN
from weightgeom.bases.tiny import Tiny
from weightgeom.data.world import World
from weightgeom.interfaces import Log, Setting
from weightgeom.models.loading import load, load_network, load_tokenizer
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.rsf import RSF
from weightgeom.table import at_own_subspaces, tabulate
from weightgeom.training.config import Training
from weightgeom.training.fit import fit, saved_trajectory
from weightgeom.trajectory import Base

ALTERNATIVES = (1.0, 2.0, 5.0, 20.0, 100.0)  # of the five groups; only their order matters


def ratios(base: Base, seed: int, training: Training) -> pd.Series:
    """The logarithm of the mean ratio by matrix and by pathway, after a training with this seed."""
    examples = World().examples()

    def train(directory: Path, log_metrics: Log) -> None:
        network, tokenizer = load_network(base.directory), load_tokenizer(base.directory)
        options = {"name": f"seed {seed}", "seed": seed, "device": "cpu", "start": base.directory}
        fit(DPO(), network, tokenizer, examples, training, directory, log_metrics=log_metrics, **options)

    of = {"base": str(base.directory), "seed": seed, "training": training}
    trajectory = saved_trajectory(mechanism.stage("training", of, train), "training", base.directory)

    def measure(directory: Path, log_metrics: Log) -> None:
        model = load(base.directory, "cpu")
        start = model.params(base.directory)
        setting = Setting(model, start, start, False, examples, 0, DPO(), training)
        rows = RSF(resamples=0).measurement(setting)(model.params(trajectory.steps[trajectory.last]))
        tabulate([{"step": trajectory.last, **row} for row in rows]).to_parquet(directory / "rsf.parquet")

    table = pd.read_parquet(mechanism.stage("rsf", of, measure) / "rsf.parquet")
    own = at_own_subspaces(table[(table["quantity"] == "ratio") & table["layer"].notna()])
    own = own[own["k"] == own["k"].min()]
    means = {
        str(key): log(part["value"].mean()) for name in ("role", "matrix") for key, part in own.groupby(name)
    }
    return pd.Series(means, name=seed)


def rejected(values: pd.DataFrame, splits: int) -> pd.DataFrame:
    """The rejection rate of each test, over random splits of the trainings (rows) and all means (columns)."""
    generator = np.random.default_rng(0)
    counts: dict[tuple[str, str, float], list[bool]] = {}

    def count(test: str, shape: str, nominal: float, happened: bool) -> None:
        counts.setdefault((test, shape, nominal), []).append(happened)

    for _ in range(splits):
        order = generator.permutation(len(values))
        for column in values:
            numbers = values[column].to_numpy()[order]
            for n in (2, 3, 5):
                apart = numbers[:n] - numbers[n : 2 * n]
                test, shape = direction(list(apart)), f"{n} pairs"
                if test is not None:
                    count("direction: larger", shape, LEVEL / 2, test.p_for <= LEVEL)
                    count("direction: smaller", shape, LEVEL / 2, test.p_against <= LEVEL)
                test = equivalence(list(apart + log(MARGIN)), log(MARGIN))
                if test is not None:
                    count("equivalence, at the margin", shape, LEVEL, test.p_for <= LEVEL)
            groups = numbers[: 4 * len(ALTERNATIVES)].reshape(len(ALTERNATIVES), 4)
            table = pd.DataFrame({
                "run": np.repeat(np.arange(len(ALTERNATIVES)), 4),
                "seed": np.tile(np.arange(4), len(ALTERNATIVES)),
                "sharpness": np.repeat(ALTERNATIVES, 4),
                "ratio": groups.ravel(),
            })  # fmt: skip
            count("rank correlation", "5 objectives, 4 seeds", LEVEL, rank_correlation(table)[1] <= LEVEL)
    return pd.DataFrame([
        {"test": test, "shape": shape, "nominal": nominal, "rate": float(np.mean(happened))}
        for (test, shape, nominal), happened in counts.items()
    ])  # fmt: skip


def main() -> None:
    """Train, measure, split, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trainings", type=int, default=20)
    parser.add_argument("--splits", type=int, default=2000)
    asked = parser.parse_args()
    if asked.trainings < 4 * len(ALTERNATIVES):
        parser.error(f"--trainings must be at least {4 * len(ALTERNATIVES)}")
    mechanism.OUTPUTS = Path("outputs/seeds_null")
    pretraining = Training(steps=600, learning_rate=3e-3, schedule="cosine", weight_decay=0.01, max_length=96)
    world = World()
    base = Tiny(corpus="world", pretraining=pretraining).prepare(
        mechanism.stage, world.examples(), world, "cpu"
    )
    training = Training(steps=64)
    values = pd.DataFrame([ratios(base, seed, training) for seed in range(asked.trainings)])
    values.to_csv(mechanism.OUTPUTS / "ratios.csv")
    spread = ", ".join(f"{name} {values[name].std():.3f}" for name in values)
    print(f"standard deviation of the logarithm of the ratio over seeds: {spread}")
    shown = Table("test", "shape", "nominal", "rate")
    for row in rejected(values, asked.splits).to_dict("records"):
        shown.add_row(row["test"], row["shape"], f"{row['nominal']:.3f}", f"{row['rate']:.3f}")
    Console(width=100).print(shown)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
