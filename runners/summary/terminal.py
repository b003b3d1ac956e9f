"""What a run shows at its end: curves for MLflow, figures, and a table in the terminal."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import logging
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from runners.tracking.redaction import redacted_text
from weightgeom.analysis.chain import BETWEEN, STAGES
from weightgeom.analysis.claims_uncertainty import STATES, _trained
from weightgeom.analysis.comparisons import _principal, comparisons, measured_effect
from weightgeom.table import label, own

if TYPE_CHECKING:
    import pandas as pd


log = logging.getLogger(__name__)


def print_summary(
    tables: "Mapping[str, pd.DataFrame]", effects: Mapping[str, str], record: Path, tracking_uri: str
) -> None:
    """The tables in short, and one line each for where the record is and how to open MLflow on it.

    `effects` has the headline of every intervention by its table's name.
    """
    from rich import get_console
    from rich.table import Table

    console = get_console()
    if STAGES in tables:
        console.print(stages_shown(tables[STAGES], Table))
    for name, table in tables.items():
        if name.startswith("rsf") and len(own(table, "ratio")) and STAGES not in tables:
            console.print(_ratios(name, table, Table))
    for name, table in tables.items():
        if name.startswith("behaviour"):
            console.print(_behaviour(name, table, Table))
        if name.startswith("moments") and len(table):
            console.print(_mechanism(name, table, Table))
        if name in effects:
            console.print(effects_shown(name, table, effects[name], Table))
    if claims := claims_shown(tables, Table):
        console.print(claims)
    console.print(f"record: {record}", soft_wrap=True)
    shown = redacted_text(tracking_uri)
    where = shown if shown.startswith("http") else f"mlflow ui --backend-store-uri {shown}"
    console.print(f"MLflow: {where}", soft_wrap=True)


def _ratios(name: str, table: "pd.DataFrame", make: type) -> object:
    """Matrix by pathway: the ratio, its null and how far it lies from it, over the layers."""
    last, first = table["step"].max(), own(table, "ratio")["step"].min()
    shown = make("pathway", "matrix", f"ratio at step {first}", f"at step {last}", "null", "z", title=name)
    for column in shown.columns[2:]:
        column.justify = "right"
    ratios = own(table, "ratio")
    sds = own(table, "null_ratio_sd")
    for (role, matrix), part in ratios.groupby(["role", "matrix"], sort=False):
        end = part[part["step"] == last]
        if not len(end):
            continue
        sd = sds[(sds["matrix"] == matrix) & (sds["step"] == last)]["value"]
        spread = sqrt((sd**2).sum()) / len(sd)  # of a mean over layers that are independent under the null
        mean = end["value"].mean()
        z = f"{(mean - 1) / spread:.1f}" if spread > 0 else "-"
        start = part[part["step"] == first]["value"].mean()
        shown.add_row(str(role), str(matrix), f"{start:.2f}", f"{mean:.2f}", f"1 ± {spread:.2f}", z)
    return shown


def _mechanism(name: str, table: "pd.DataFrame", make: type) -> object:
    """Matrix by pathway: predicted, forecast and measured ratio, and the correlations, at the last step."""
    last = table[table["step"] == table["step"].max()]
    quantities = ("predicted_ratio", "forecast_ratio", "measured_ratio")
    shown = make("pathway", "matrix", *(one.removesuffix("_ratio") for one in quantities), title=name)
    means = {
        quantity: own(last, quantity).groupby(["role", "matrix"], sort=False)["value"].mean()
        for quantity in quantities
    }
    for place in means["measured_ratio"].index:
        values = (means[quantity].get(place) for quantity in quantities)
        shown.add_row(*place, *("-" if value is None else f"{value:.2f}" for value in values))
    for role in ("read", "write"):
        found = {
            one: last[last["quantity"] == f"{role}_{one}_correlation"]["value"]
            for one in ("predicted", "forecast")
        }
        values = [f"{value.iloc[0]:.2f}" if len(value) else "-" for value in found.values()]
        shown.add_row(role, "correlation", *values, "1")
    return shown


def _behaviour(name: str, table: "pd.DataFrame", make: type) -> object:
    first, last = table["step"].min(), table["step"].max()
    names = table.attrs.get(STAGES)  # of a chain all steps are shown, by their names
    steps = (first, last) if names is None else sorted(table["step"].unique())
    heads = [f"step {step}" if names is None else names[step] for step in steps]
    title = name.replace(BETWEEN, ", each stage against the one before it")
    shown = make("quantity", *heads, "unit", title=title)
    for quantity, part in table.groupby("quantity", sort=False):
        values = [
            " ± ".join(f"{number:.3g}" for number in row[["value", "stderr"]].dropna())
            for step in steps
            for _, row in part[part["step"] == step].iterrows()
        ]
        shown.add_row(str(quantity), *values, part["unit"].iloc[0])
    return shown


def effects_shown(name: str, table: "pd.DataFrame", effect: str, make: type) -> object:
    """The comparisons of an intervention with its principal controls, as a table for the terminal."""
    effect = measured_effect(table, effect)
    found = _principal(comparisons(table, effect))
    unit = table[table["quantity"] == effect]["unit"].iloc[0]
    against = " or ".join(found["against"].unique())
    title = f"{name}: {effect} ({unit}) beside the median of {against} controls"
    shown = make("matrix", "layer", "k", "treatment", "effect", "controls", "p", "q", title=title)
    for column in shown.columns[4:]:
        column.justify = "right"
    for _, row in found.assign(matrix=label(found)).iterrows():
        shown.add_row(
            row["matrix"] or row["role"] or "all",
            *("-" if row[key] < 0 else str(int(row[key])) for key in ("layer", "k")),
            f"{row['treatment']}@{row['dose']}",
            *(f"{row[key]:.3g}" for key in ("effect", "controls", "p_value", "q_value")),
        )
    return shown


def stages_shown(table: "pd.DataFrame", make: type) -> object:
    """A row for every stage and what it is compared with: the mean ratio of every matrix, and its z."""
    means = table[table["layer"].isna()]
    matrices = list(dict.fromkeys(zip(means["matrix"], means["role"], strict=True)))
    heads = [f"{matrix} ({role})" for matrix, role in matrices]
    shown = make("stage", "against", *heads, "‖dW‖", title="stages: relative subspace fraction (z)")
    for column in shown.columns[2:]:
        column.justify = "right"
    for (stage, against), part in means.groupby(["stage", "against"], sort=False):
        values = part.set_index(["matrix", "quantity"])["value"]
        norm = sqrt((part[part["quantity"] == "delta_norm"]["value"] ** 2).sum())
        shown.add_row(stage, against, *(_cell(values, matrix) for matrix, _ in matrices), f"{norm:.3g}")
    return shown


def _cell(values: "pd.Series", matrix: str) -> str:
    if (matrix, "ratio") not in values.index:
        return "unmoved"
    z = f" ({values[matrix, 'z']:.1f})" if (matrix, "z") in values.index else ""
    return f"{values[matrix, 'ratio']:.2f}{z}"


def claims_shown(tables: "Mapping[str, pd.DataFrame]", make: type) -> object | None:
    """The claims of arXiv:2603.13911v1 with their verdicts, as a table for the terminal; None if untested."""
    if not {"uncertainty", *STATES} & tables.keys():
        return None
    from weightgeom.analysis.claims_uncertainty import lines

    shown = make("claim", "verdict", "evidence", title="arXiv:2603.13911v1")
    for line in lines(tables, _trained(tables)):
        shown.add_row(line.claim, line.verdict, line.evidence)
    return shown
