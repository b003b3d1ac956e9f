"""The one result format: tidy tables, one number a row, with its unit and the number of samples behind it."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
PRETRAINING = "_pretraining"  # of the base that is then trained: the suffix of its tables and metrics

Row = dict[str, Any]
"""One number of a result table; its keys are the columns of `COLUMNS`."""

COLUMNS = {
    "step": "int64",  # optimizer step; 0 is before training
    "layer": "Int64",  # missing for what belongs to no layer
    "matrix": "str",  # q k v o gate up down router unembed embed, `q.0` (head), `up.0` (expert), or ""
    "role": "str",  # read, write or ""
    "arm": "str",  # of an intervention, or ""
    "subspace": "str",  # attention_input, mlp_input, prediction, random, residual, a pair `one:other`, or ""
    "k": "Int64",  # dimension of the subspace, or index of an eigenvalue, or missing
    "quantity": "str",
    "unit": "str",  # "1" if none
    "value": "float64",
    "stderr": "Float64",  # standard error of a mean; missing where the value is not one
    "n": "int64",  # samples behind the value
}


def row(
    quantity: str, value: float, *, n: int, unit: str = "1", stderr: float | None = None, **place: object
) -> Row:
    """One number, at the place (`layer`, `matrix`, `role`, `arm`, `subspace`, `k`) where it was measured."""
    return {"quantity": quantity, "unit": unit, "value": float(value), "stderr": stderr, "n": n, **place}


def tabulate(rows: Iterable[Row]) -> "pd.DataFrame":
    """The rows as a table with the columns and types of `COLUMNS`.

    Raises:
        ValueError: for an unknown column, or a value or standard error that is not finite.
    """
    import pandas as pd

    rows = list(rows)
    table = pd.DataFrame(rows)
    if unknown := sorted(set(table.columns) - set(COLUMNS)):
        raise ValueError(f"unknown table columns {unknown}; a table has {list(COLUMNS)}")
    table = table.reindex(columns=list(COLUMNS))
    for column in ("matrix", "role", "arm", "subspace"):
        table[column] = table[column].astype(object).where(table[column].notna(), "")
    table = table.astype(COLUMNS)
    # From the rows: in the table a NaN standard error is a missing one.
    finite = [isfinite(one["value"]) and isfinite(one.get("stderr") or 0.0) for one in rows]
    if not all(finite):
        first = table.iloc[finite.index(False)]
        raise ValueError(
            f"{finite.count(False)} values are not finite, the first {first['quantity']} of matrix"
            f" {first['matrix']!r} in layer {first['layer']} at step {first['step']}"
        )
    return table


def own(table: "pd.DataFrame", quantity: str) -> "pd.DataFrame":
    """Rows of one quantity at the matrices' own subspaces, at the smallest k; those of heads are left out."""
    whole = ~table["subspace"].isin(["", "random"]) & ~table["matrix"].str.contains(".", regex=False)
    rows = table[(table["quantity"] == quantity) & whole]
    return rows[rows["k"] == rows["k"].min()]
