"""What a run shows at its end: curves for MLflow, figures, and a table in the terminal."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from runners.comparisons import draw_effects, effects_shown
from runners.record import Record
from runners.redaction import redacted_text
from runners.stages import BETWEEN, STAGES, draw_stages, stages_shown
from runners.store import full_disk_explained
from runners.uncertainty import claims_shown, draw_uncertainty

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
MAIN, SECONDARY = ("rsf", "behaviour"), ("moments", "spectrum", "overlap", "uncertainty")
# Of the probe `uncertainty`, which has hundreds: means over layers and groups.
CURVES = (
    "auroc_logistic", "amplification", "mle_dimension_calibrated_ratio", "fisher_ratio", "gradient_coupling"
)  # fmt: skip
PRETRAINING = "_pretraining"  # of the base that is then trained: the suffix of its tables and metrics


@contextmanager
def progress_bar(name: str, steps: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A progress bar of `steps` steps; what it yields takes the current step and its metrics."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as progress:
        task = progress.add_task(name, total=steps, loss="")

        def advance(step: int, metrics: Mapping[str, float]) -> None:
            shown = {"loss": f"loss {metrics['loss']:.3f}"} if "loss" in metrics else {}
            progress.update(task, completed=step, **shown)

        yield advance


def log_table(record: Record, probe: str, suffix: str, table: "pd.DataFrame", quantity: str) -> None:
    """Curves of a table: every matrix's headline `quantity`, the mean over layers at each step, and by
    layer at the last step; what belongs to no matrix, as it is.

    MLflow's pages slow down past some 50 keys, so the pretraining has curves of the main probes alone,
    and the secondary ones have no profiles over layers: their tables have it all.
    """
    if suffix and probe not in MAIN:
        return
    if not len(table):  # such as a probe of the objective on a trajectory that has none
        return
    whole = table[table["matrix"] == ""]
    if probe == "uncertainty":
        whole = whole[whole["quantity"].isin(CURVES)]
    for (step, name), value in whole.groupby(["step", "quantity"])["value"].mean().items():
        record.log({f"{probe}{suffix}/{name}": value}, step)
    rows = own(table[table["matrix"] != ""], quantity)
    for (step, matrix), value in rows.groupby(["step", "matrix"])["value"].mean().items():
        record.log({f"{probe}{suffix}/{matrix}": value}, step)
    if not suffix and probe not in SECONDARY:
        for _, row in rows[rows["step"] == table["step"].max()].iterrows():
            record.log({f"{probe}_by_layer/{row['matrix']}": row["value"]}, int(row["layer"]))


def own(table: "pd.DataFrame", quantity: str) -> "pd.DataFrame":
    """Rows of one quantity at the matrices' own subspaces, at the smallest k; those of heads are left out."""
    whole = ~table["subspace"].isin(["", "random"]) & ~table["matrix"].str.contains(".", regex=False)
    rows = table[(table["quantity"] == quantity) & whole]
    return rows[rows["k"] == rows["k"].min()]


def draw(tables: "Mapping[str, pd.DataFrame]", record: Record) -> None:
    """The figures of the probes `rsf` and `moments` and of interventions, as PNG and PDF, into the record."""
    from weightgeom import figures  # noqa: PLC0415 (heavy)

    def save(name: str, figure: object) -> None:
        with full_disk_explained(record.directory):
            paths = [record.artifact(f"figures/{name}.{ending}") for ending in ("png", "pdf")]
            figures.save(figure, *paths)  # pyright: ignore[reportArgumentType]

    draw_effects(tables, save)
    draw_uncertainty(tables, record, save)
    if "moments" in tables and len(own(tables["moments"], "measured_ratio")):
        save("mechanism", figures.expected_and_measured(tables["moments"]))
    if STAGES in tables:
        draw_stages(tables, save)
        return

    found = {
        "pretraining" if name.endswith(PRETRAINING) else "training": table
        for name, table in tables.items()
        if name.startswith("rsf") and len(own(table, "ratio"))
    }
    if not found:
        return

    save("ratio_by_step", figures.ratio_by_step(found))
    increments = {name: table for name, table in found.items() if len(own(table, "increment_ratio"))}
    if increments:
        save("increment_by_step", figures.ratio_by_step(increments, "increment_ratio"))
    for name, table in found.items():
        suffix = PRETRAINING if name == "pretraining" and len(found) > 1 else ""
        save(f"ratio_by_layer{suffix}", figures.ratio_by_layer(table, int(table["step"].max())))


def print_summary(
    tables: "Mapping[str, pd.DataFrame]", effects: Mapping[str, str], record: Path, tracking_uri: str
) -> None:
    """The tables in short, and one line each for where the record is and how to open MLflow on it.

    `effects` has the headline of every intervention by its table's name.
    """
    from rich import get_console  # noqa: PLC0415 (slow)
    from rich.table import Table  # noqa: PLC0415

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
