"""Pairs of trainings in a table of alignments: of a sweep's trainings, or of the stages of a chain."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false

import re
from typing import TYPE_CHECKING

from weightgeom.analysis.chain import STAGES
from weightgeom.analysis.settings import TRAINED_BY
from weightgeom.table import of_the_model

if TYPE_CHECKING:
    import pandas as pd

ALIGNMENT = "alignment"  # the name of such a table
CONTRAST, LIKELIHOOD = "contrast", "likelihood"
REWARDED = re.compile(r"(rlvr|rl|apo)\d*")  # further names of trainings by rewards
OF_TRAININGS = ("between_", "within_")  # the starts of quantities that are about several pairs
SEED = re.compile(r"\.\d+$")


def training_of(name: str) -> str:
    """The training that a name such as `dpo.1` is a seed of."""
    return SEED.sub("", name)


def kind_of(training: str) -> str:
    """The kind of a training by its name: contrast (preferences, rewards), likelihood, or "" (unknown)."""
    return CONTRAST if REWARDED.fullmatch(training) else TRAINED_BY.get(training, "")


def pairs(table: "pd.DataFrame", step: int) -> "pd.DataFrame":
    """A row for every two updates A and B over all matrices, with their quantities in columns.

    The index is `first second`, the names of both: of trainings as `weightgeom align` has them, of a chain
    those of the stages, of one training's checkpoints `step 4`.
    """
    rows = of_the_model(table)
    rows = rows[(rows["step"] == step) & (rows["against"] != "") & (rows["subspace"] == "")]
    rows = rows[~rows["quantity"].str.startswith(OF_TRAININGS)]
    stages = table.attrs.get(STAGES)

    def named(place: object) -> str:
        return f"step {place}" if stages is None else str(stages[int(str(place))])

    of_trainings = rows["treatment"] != ""
    first = rows["treatment"].where(of_trainings, rows["step"].map(named))
    places = "" if bool(of_trainings.all()) else rows["against"].map(named)
    second = rows["against"].where(of_trainings, places)
    return rows.assign(first=first, second=second).pivot(
        index=["first", "second"], columns="quantity", values="value"
    )


def between(table: "pd.DataFrame", quantity: str) -> "pd.DataFrame":
    """A row for every two trainings with several seeds: the quantity between them and within each.

    The index is `first second`; columns `between within sd`, means over pairs and the spread within.
    """
    names = {
        "between": f"between_{quantity}_mean",
        "within": f"within_{quantity}_mean",
        "sd": f"within_{quantity}_sd",
    }
    rows = table[table["quantity"].isin(names.values())]
    wide = rows.pivot(index=["treatment", "against"], columns="quantity", values="value")
    wide = wide.reindex(columns=list(names.values())).rename_axis(index=["first", "second"], columns=None)
    return wide.set_axis(list(names), axis=1)
