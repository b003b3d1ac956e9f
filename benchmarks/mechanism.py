"""Forecast, predicted and measured write-side ratio over objectives, preference kinds, layers, o and down.

    .venv/bin/python benchmarks/mechanism.py

Trains the embedded base by cross-entropy on the chosen responses and by DPO, on each of the three
preference kinds, and compares what the base's moments lead to expect with what training did to the
weights: one table of correlations, and the figure `outputs/mechanism/mechanism.png`. Ten minutes on two
cores where the base is not there yet. Options are passed on to `run.py`.
"""

import sys
from pathlib import Path
from subprocess import run

import pandas as pd
from rich.console import Console
from rich.table import Table

from weightgeom.figures import base as figures

ROOT = Path(__file__).parents[1]
OBJECTIVES = {"ce": ["objective=ce", "objective.on=chosen"], "dpo": ["objective=dpo"]}
PREFERENCES = ("style", "facts", "facts_style")
NAMES = ("predicted", "mean", "forecast", "measured")


def measured(objective: str, preference: str, options: list[str]) -> pd.DataFrame:
    """The table of the probe `moments` of one run, its last step."""
    place = Path("outputs/mechanism").resolve() / f"{objective}_{preference}"
    command = [
        *(sys.executable, str(ROOT / "run.py"), *OBJECTIVES[objective]),
        *(f"data.preference={preference}", "probe=[moments]", f"hydra.run.dir={place}", "model.corpus=world"),
        *options,
    ]
    run(command, check=True)
    table = pd.read_parquet(place / "record/artifacts/tables/moments.parquet")
    return table[table["step"] == table["step"].max()].assign(run=f"{objective} {preference}")


def main() -> None:
    """Run, correlate, draw."""
    tables = [
        measured(objective, preference, sys.argv[1:])
        for preference in PREFERENCES
        for objective in OBJECTIVES
    ]
    table = pd.concat(tables, ignore_index=True)
    rows = table[table["quantity"].isin([f"{one}_ratio" for one in NAMES])]
    wide = rows.pivot(index=["run", "role", "matrix", "layer"], columns="quantity", values="value")
    shown = Table("run", "matrix", *NAMES, title="means over layers")
    for (name, matrix), part in wide.groupby(["run", "matrix"], sort=False):
        shown.add_row(name, matrix, *(f"{part[f'{one}_ratio'].mean():.2f}" for one in NAMES))
    Console().print(shown)
    correlations = Table("pathway", "points", *NAMES[:-1], title="correlation with measured")
    for role, part in wide.groupby("role"):
        matrix = part.corr()["measured_ratio"]
        values = (f"{matrix[f'{one}_ratio']:.3f}" for one in NAMES[:-1])
        correlations.add_row(str(role), str(len(part)), *values)
    Console().print(correlations)
    directory = Path("outputs/mechanism")
    figures.save(
        figures.expected_and_measured(table), directory / "mechanism.png", directory / "mechanism.pdf"
    )
    wide.to_csv(directory / "mechanism.csv")


if __name__ == "__main__":
    main()
