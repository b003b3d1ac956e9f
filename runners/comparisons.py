"""What a run shows of its interventions: curves for MLflow, figures, and tables in the terminal."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportOperatorIssue=false, reportAssignmentType=false

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from runners.record import Record

if TYPE_CHECKING:
    import pandas as pd

MARGIN = "preference_margin_change"
ARM = r"^(?P<treatment>[^@/]+)@(?P<dose>[^/]+)/(?P<against>.+)$"  # of a comparison, as `trials` names it


def comparisons(table: "pd.DataFrame", effect: str) -> "pd.DataFrame":
    """A row for every treatment, dose and kind of control: its effect, the controls' median, p and q.

    Columns: `layer matrix role k dose treatment against effect controls p_value q_value`.
    """
    place = ["layer", "matrix", "role", "k"]
    table = table.assign(layer=table["layer"].fillna(-1), k=table["k"].fillna(-1))  # to group by
    found = table[table["quantity"] == f"{effect}_p_value"].copy()
    found[["treatment", "dose", "against"]] = found["arm"].str.extract(ARM)
    found = found.rename(columns={"value": "p_value"})
    arms = table[table["quantity"] == effect]
    treatments = arms.set_index([*place, "arm"])["value"]
    controls = arms.assign(arm=arms["arm"].str.replace(r"\.\d+@", "@", regex=True))
    medians = controls.groupby([*place, "arm"])["value"].median()
    q_values = table[table["quantity"] == f"{effect}_q_value"].set_index([*place, "arm"])["value"]
    for name, values, arm in (
        ("effect", treatments, found["treatment"] + "@" + found["dose"]),
        ("controls", medians, found["against"] + "@" + found["dose"]),
        ("q_value", q_values, found["arm"]),
    ):
        keys = [tuple(key) for key in found[place].assign(arm=arm).itertuples(index=False)]
        found[name] = values.reindex(keys).to_numpy()
    columns = [*place, "dose", "treatment", "against", "effect", "controls", "p_value", "q_value"]
    return found[columns].reset_index(drop=True)


def measured_effect(table: "pd.DataFrame", wanted: str) -> str:
    """The effect that is wanted, or the KL where the data allow no other: they may have no pairs."""
    return wanted if (table["quantity"] == wanted).any() else "kl_from_unedited"


def log_effects(record: Record, name: str, table: "pd.DataFrame", effect: str) -> None:
    """Curves of an intervention: the treatment's effect and its p-value among the first kind of control.

    By layer where it has one, at the largest dose; otherwise by the dimension k, for every dose.
    """
    found = comparisons(table, measured_effect(table, effect))
    for _, row in _principal(found).iterrows():
        layered = row["layer"] >= 0
        curve = row["matrix"] or row["role"] or "all"
        key = f"{name}_by_layer/{curve}" if layered else f"{name}/{curve}_{row['dose']}"
        step = max(0, int(row["layer"] if layered else row["k"]))
        record.log({key: row["effect"], f"{key}_p_value": row["p_value"]}, step)


def _principal(found: "pd.DataFrame") -> "pd.DataFrame":
    """Comparisons with the first kind of control; of numerical doses the largest."""
    import pandas as pd  # noqa: PLC0415 (slow)

    found = found[found["against"] == found.groupby(["treatment", "dose"])["against"].transform("first")]
    doses = pd.to_numeric(found["dose"], errors="coerce")
    return found[doses.isna() | (doses == doses.max())]


def draw_effects(tables: "Mapping[str, pd.DataFrame]", save: Callable[[str, object], None]) -> None:
    """The figures of the interventions `rank1` and `surgery`."""
    if not {"rank1", "surgery"} & tables.keys():
        return
    from weightgeom import figures_causal  # noqa: PLC0415 (heavy)

    if "rank1" in tables:
        save("rank1_by_layer", figures_causal.treatment_by_layer(tables["rank1"]))
        save("rank1_dose_response", figures_causal.dose_response(tables["rank1"]))
        if (tables["rank1"]["quantity"] == MARGIN).any():
            save("rank1_dose_response_margin", figures_causal.dose_response(tables["rank1"], MARGIN))
    if "surgery" in tables and (tables["surgery"]["quantity"] == MARGIN).any():
        save("surgery", figures_causal.surgery_curve(tables["surgery"]))
        if tables["surgery"]["arm"].str.endswith("@transplant").any():
            save("transplants", figures_causal.transplants(tables["surgery"]))


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
    for _, row in found.iterrows():
        shown.add_row(
            row["matrix"] or row["role"] or "all",
            *("-" if row[key] < 0 else str(int(row[key])) for key in ("layer", "k")),
            f"{row['treatment']}@{row['dose']}",
            *(f"{row[key]:.3g}" for key in ("effect", "controls", "p_value", "q_value")),
        )
    return shown
