"""The one result format: tidy tables, one number a row, with its unit and the number of samples behind it."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import re
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
MEANS = "_means"  # the suffix of the table with the means over matrices, which have no layer
PARAMETERS = "_parameters"  # of the table with the parameters outside the residual-stream map
PRETRAINING = "_pretraining"  # of the base that is then trained: the suffix of its tables and metrics

OWN_SUBSPACES = {
    *("", "random", "attention_input", "mixer_input", "mlp_input", "final_input", "prediction", "residual")
}
"""Names of subspaces that a run has without being given any."""

Row = dict[str, Any]
"""One number of a result table; its keys are the columns of `COLUMNS`."""

COLUMNS = {
    "step": "int64",  # optimizer step; 0 is before training
    "layer": "Int64",  # missing for what belongs to no layer
    "matrix": "str",  # a kind such as q, up, router, unembed, embed, norm, qk, several as `q+k`, rest, or ""
    "head": "Int64",  # of q and o, or key-value group of k and v; missing for a whole matrix
    "expert": "Int64",  # of a mixture; missing for a matrix outside of one
    "parameter": "str",  # the name of a parameter that no matrix of the residual stream lies in, or ""
    "token": "str",  # of a row of an embedding, as its tokenizer writes it, or ""
    "role": "str",  # read, write or ""
    "arm": "str",  # of an intervention, or ""; its parts are the next four columns
    "treatment": "str",  # kind of the arm or of a comparison's treatment; group of the probe `uncertainty`
    "draw": "Int64",  # number of a control among its kind; missing for a treatment
    "dose": "str",  # strength or operation of an edit, threshold of the probe `uncertainty`, or ""
    "against": "str",  # of a comparison, the kind of control or the other group, or ""
    "subspace": "str",  # attention_input, final_input, prediction, random, ..., a pair `one:other`, or ""
    "k": "Int64",  # dimension of the subspace, or index of an eigenvalue, or missing
    "quantity": "str",
    "unit": "str",  # "1" if none
    "value": "float64",
    "stderr": "Float64",  # standard error of a mean; missing where the value is not one
    "n": "int64",  # samples behind the value
}
# Columns that tables of earlier versions lack, and the patterns of the names that held them.
ADDED = {
    name: COLUMNS[name]
    for name in ("head", "expert", "parameter", "token", "treatment", "draw", "dose", "against")
}
PART = r"^(?P<kind>[^.]+)\.(?P<number>\d+)$"
ARM = r"^(?P<treatment>[^@/]*?)(?:\.(?P<draw>\d+)(?=@))?(?:@(?P<dose>[^/]+))?(?:/(?P<against>.+))?$"


def row(
    quantity: str, value: float, *, n: int, unit: str = "1", stderr: float | None = None, **place: object
) -> Row:
    """One number, at the place where it was measured: `layer`, `matrix`, `head`, `subspace`, ...

    The columns of an arm come from `arm_columns`, those of a matrix from `ResidualMatrix.table_columns`.
    """
    return {"quantity": quantity, "unit": unit, "value": float(value), "stderr": stderr, "n": n, **place}


def arm_columns(
    treatment: str, dose: str = "", *, draw: int | None = None, against: str = ""
) -> dict[str, Any]:
    """The columns of an arm: its parts, and their label `arm`.

    Labels are `top@remove` (treatment), `random.3@0.1` (control) and `top@0.1/random` (comparison).
    """
    name = treatment if draw is None else f"{treatment}.{draw}"
    name += f"@{dose}" if dose else ""
    name += f"/{against}" if against else ""
    return {"arm": name, "treatment": treatment, "draw": draw, "dose": dose, "against": against}


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
    for column in (name for name, dtype in COLUMNS.items() if dtype == "str"):
        table[column] = table[column].astype(object).where(table[column].notna(), "")
    table = table.astype(COLUMNS)
    # From the rows: in the table a NaN standard error is a missing one.
    finite = [isfinite(entry["value"]) and isfinite(entry.get("stderr") or 0.0) for entry in rows]
    if not all(finite):
        first = table.assign(matrix=label(table)).iloc[finite.index(False)]
        raise ValueError(
            f"{finite.count(False)} values are not finite, the first {first['quantity']} of matrix"
            f" {first['matrix']!r} in layer {first['layer']} at step {first['step']}"
        )
    return table


def upgraded(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with the columns that an earlier version did not write; a table of today as it is.

    Earlier versions had a head (`q.0`) or an expert (`up.5`) in `matrix`, and an arm in `arm` alone.
    """
    missing = [column for column in ADDED if column not in table]
    if not missing or not {"matrix", "arm"} <= set(table.columns):
        return table
    part = table["matrix"].astype(object).str.extract(PART)
    number, of_head = part["number"].astype("Int64"), part["kind"].isin(["q", "k", "v", "o"])
    parts = table["arm"].astype(object).str.extract(ARM).fillna({"treatment": "", "dose": "", "against": ""})
    parts = parts.assign(head=number.where(of_head), expert=number.where(~of_head), parameter="", token="")
    parts = table.assign(
        matrix=part["kind"].fillna(table["matrix"]).astype("str"),
        **{column: parts[column].astype(ADDED[column]) for column in missing},
    )
    return parts[
        [*(name for name in COLUMNS if name in parts), *table.columns.difference(COLUMNS, sort=False)]
    ]


def apart(table: "pd.DataFrame", headline: str) -> "dict[str, pd.DataFrame]":
    """Rows of matrices, of a headline's means over them, and of other parameters, by their table's suffix."""
    means = table["quantity"].str.startswith(f"{headline}_mean") & table["layer"].isna() & bool(headline)
    others = table["parameter"] != ""
    parts = {"": table[~means & ~others], MEANS: table[means], PARAMETERS: table[others]}
    return {suffix: part.reset_index(drop=True) for suffix, part in parts.items() if len(part) or not suffix}


def joined(tables: "Mapping[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
    """The tables by name, those of `apart` behind the rows of matrices, as a run has them in memory."""
    import pandas as pd

    whole = {
        name: table for name, table in tables.items() if _whole(name) not in tables or _whole(name) == name
    }
    for name, rows in whole.items():
        others = [tables[f"{name}{end}"] for end in (MEANS, PARAMETERS) if f"{name}{end}" in tables]
        if others:
            whole[name] = pd.concat([rows, *others], ignore_index=True)
            whole[name].attrs = rows.attrs
    return whole


def _whole(name: str) -> str:
    return name.removesuffix(MEANS).removesuffix(PARAMETERS)


def label(table: "pd.DataFrame") -> "pd.Series":
    """The name of every row's matrix: `q`, `q.0` for a head, `up.5` for an expert's."""
    number = table["head"].fillna(table["expert"]).fillna(-1)
    return table["matrix"].where(number < 0, table["matrix"] + "." + number.astype("str"))


def whole_matrices(table: "pd.DataFrame") -> "pd.DataFrame":
    """Rows of no single head, and of no parameter outside the residual stream; an expert's are whole ones."""
    return table[table["head"].isna() & (table["parameter"] == "")]


def of_the_model(table: "pd.DataFrame", headline: str = "") -> "pd.DataFrame":
    """Rows of no matrix, without those of a pathway's mean headline."""
    return table[(table["matrix"] == "") & ~table["quantity"].str.startswith(f"{headline or '-'}_mean")]


def at_own_subspaces(table: "pd.DataFrame") -> "pd.DataFrame":
    """Rows of whole matrices at their own subspaces: the input of one that reads, prediction for writes."""
    return whole_matrices(table[~table["subspace"].isin(["", "random"])])


def given_name(subspace: str) -> str:
    """The name of a given subspace, or of a pair with one; "" for those that every run has."""
    return "" if set(re.split("[+:]", subspace)) <= OWN_SUBSPACES else subspace


def by_given_subspace(table: "pd.DataFrame") -> "dict[str, pd.DataFrame]":
    """The rows by the given subspace that they are of, by its name; "" for all others, which come first."""
    given = table["subspace"].map(given_name)
    return {name: table[given == name] for name in ["", *(name for name in given.unique() if name)]}


def own(table: "pd.DataFrame", quantity: str) -> "pd.DataFrame":
    """Rows of one quantity of whole matrices at their own subspaces, at the smallest k if they have one."""
    rows = at_own_subspaces(table[table["quantity"] == quantity])
    return rows if rows["k"].isna().all() else rows[rows["k"] == rows["k"].min()]


def of_matrices(table: "pd.DataFrame", quantity: str) -> "pd.DataFrame":
    """Rows of one quantity by step, layer and matrix: those of `own`, or those without a subspace."""
    rows = own(table, quantity)
    if len(rows):
        return rows
    whole = whole_matrices(table[(table["matrix"] != "") & (table["subspace"] == "")])
    rows = whole[whole["quantity"] == quantity]
    return rows[rows["k"].isna()] if rows["k"].isna().any() else rows[rows["k"] == rows["k"].min()]


def null_of_mean(table: "pd.DataFrame", headline: str, sds: "pd.DataFrame", **place: object) -> float | None:
    """The null's standard deviation of a headline's mean over the matrices whose own are `sds`.

    `place` is the `role` and the `matrix` ("" for all of the role) and, of one dimension or step among
    several, its `k` and `step`. Taken from the table's rows `<headline>_mean_null_sd`; a table without them
    gives the mean of `sds`, as if all matrices varied together, which errs on the wide side. None without
    either.
    """
    joint = table[table["quantity"] == f"{headline}_mean_null_sd"]
    for column, value in place.items():
        joint = joint[joint[column] == value]
    rows = joint if len(joint) else sds
    return float(rows["value"].mean()) if len(rows) else None
