"""MLflow curves of a run's tables."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from typing import TYPE_CHECKING

from runners.tracking.record import Record
from weightgeom.analysis.comparisons import _principal, comparisons, measured_effect
from weightgeom.table import label, own

if TYPE_CHECKING:
    import pandas as pd


MAIN, SECONDARY = ("rsf", "behaviour"), ("moments", "spectrum", "overlap", "uncertainty")


# Of the probe `uncertainty`, which has hundreds: means over layers and groups.
CURVES = (
    "auroc_logistic", "amplification", "mle_dimension_calibrated_ratio", "fisher_ratio", "gradient_coupling"
)  # fmt: skip


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


def log_effects(record: Record, name: str, table: "pd.DataFrame", effect: str) -> None:
    """Curves of an intervention: the treatment's effect and its p-value among the first kind of control.

    By layer where it has one, at the largest dose; otherwise by the dimension k, for every dose.
    """
    found = _principal(comparisons(table, measured_effect(table, effect)))
    for _, row in found.assign(matrix=label(found)).iterrows():
        layered = row["layer"] >= 0
        curve = row["matrix"] or row["role"] or "all"
        key = f"{name}_by_layer/{curve}" if layered else f"{name}/{curve}_{row['dose']}"
        step = max(0, int(row["layer"] if layered else row["k"]))
        record.log({key: row["effect"], f"{key}_p_value": row["p_value"]}, step)
