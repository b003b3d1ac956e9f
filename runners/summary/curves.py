"""MLflow curves of a run's tables."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from typing import TYPE_CHECKING

from runners.tracking.record import Record
from weightgeom.analysis.comparisons import compared_with_principal, measured_effect
from weightgeom.declarations import InterventionDeclaration, ProbeDeclaration
from weightgeom.table import given_name, label, of_matrices, of_the_model

if TYPE_CHECKING:
    import pandas as pd


def log_table(
    record: Record, probe: str, suffix: str, table: "pd.DataFrame", declaration: ProbeDeclaration
) -> None:
    """Curves of a table: every matrix's headline, the mean over layers at each step, and by layer at the
    last step; quantities without a matrix, as they are.

    MLflow's pages slow down past some 50 keys, so a probe declares whether it has curves of the pretraining
    and profiles over layers: its tables have it all.
    """
    if suffix and not declaration.of_pretraining:
        return
    if not len(table):  # such as a probe of the objective on a trajectory that has none
        return
    whole = of_the_model(table, declaration.headline)
    if declaration.whole:
        whole = whole[whole["quantity"].isin(declaration.whole)]
    for (step, name), value in whole.groupby(["step", "quantity"])["value"].mean().items():
        record.log({f"{probe}{suffix}/{name}": value}, step)
    rows = of_matrices(table, declaration.headline)
    for (step, matrix), value in rows.groupby(["step", "matrix"])["value"].mean().items():
        record.log({f"{probe}{suffix}/{matrix}": value}, step)
    if not suffix and declaration.by_layer:
        last = rows[(rows["step"] == table["step"].max()) & rows["layer"].notna()]
        for (layer, matrix), value in last.groupby(["layer", "matrix"], sort=False)["value"].mean().items():
            record.log({f"{probe}_by_layer/{matrix}": value}, int(layer))


def log_effects(
    record: Record, name: str, table: "pd.DataFrame", declaration: InterventionDeclaration
) -> None:
    """Curves of an intervention: the treatment's effect and its p-value among the principal controls.

    By layer where it has one, at the largest dose; otherwise by the dimension k, for every dose.
    """
    effect = measured_effect(table, declaration.effects)
    compared = compared_with_principal(table, effect, declaration.controls)
    for _, row in compared.assign(matrix=label(compared)).iterrows():
        layered = row["layer"] >= 0
        parts = [row["matrix"] or row["role"] or "all", given_name(row["subspace"])]
        curve = "_".join(filter(None, parts))
        key = f"{name}_by_layer/{curve}" if layered else f"{name}/{curve}_{row['dose']}"
        step = max(0, int(row["layer"] if layered else row["k"]))
        record.log({key: row["effect"], f"{key}_p_value": row["p_value"]}, step)
