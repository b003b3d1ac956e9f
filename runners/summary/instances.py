"""The tables of one instance of a probe or an intervention among those of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightgeom.analysis.chain import BETWEEN, STAGES
from weightgeom.table import PRETRAINING

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = {"pretraining": PRETRAINING, "training": "", "between": BETWEEN}


def of_instance(name: str, tables: "Mapping[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
    """Its tables that have rows by what they are of; of a chain also its rows of the table `stages`."""
    found = {of: tables[name + suffix] for of, suffix in SUFFIXES.items() if name + suffix in tables}
    found = {of: table for of, table in found.items() if len(table)}
    if STAGES in tables:
        stages: pd.DataFrame = tables[STAGES][tables[STAGES]["probe"] == name]  # pyright: ignore[reportAssignmentType]
        if len(stages):
            found[STAGES] = stages
    return found


def names_of(name: str) -> list[str]:
    """All names that the tables of an instance may have."""
    return [name + suffix for suffix in SUFFIXES.values()]
