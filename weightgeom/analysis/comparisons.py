"""Comparisons of an intervention's treatments with their matched controls."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportOperatorIssue=false, reportAssignmentType=false

from typing import TYPE_CHECKING

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


def _principal(found: "pd.DataFrame") -> "pd.DataFrame":
    """Comparisons with the first kind of control; of numerical doses the largest."""
    import pandas as pd

    found = found[found["against"] == found.groupby(["treatment", "dose"])["against"].transform("first")]
    doses = pd.to_numeric(found["dose"], errors="coerce")
    return found[doses.isna() | (doses == doses.max())]
