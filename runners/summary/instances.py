"""The tables of one instance of a probe or an intervention among those of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightgeom.analysis.chain import BETWEEN, STAGES
from weightgeom.table import PRETRAINING

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = {"pretraining": PRETRAINING, "training": "", "between": BETWEEN}


def of_instance(name: str, tables: "Mapping[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
    """Its tables that have rows, by trajectory; of a chain also its rows of the table `stages`."""
    by_trajectory = {of: tables[name + suffix] for of, suffix in SUFFIXES.items() if name + suffix in tables}
    by_trajectory = {of: table for of, table in by_trajectory.items() if len(table)}
    if STAGES in tables:
        stages: pd.DataFrame = tables[STAGES][tables[STAGES]["probe"] == name]  # pyright: ignore[reportAssignmentType]
        if len(stages):
            by_trajectory[STAGES] = stages
    return by_trajectory


def names_of(name: str) -> list[str]:
    """All names that the tables of an instance may have."""
    return [name + suffix for suffix in SUFFIXES.values()]
