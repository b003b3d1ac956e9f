"""Comparisons of an intervention's treatments with their matched controls."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportOperatorIssue=false, reportAssignmentType=false

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


MARGIN = "preference_margin_change"


def comparisons(table: "pd.DataFrame", effect: str) -> "pd.DataFrame":
    """A row for every treatment, dose and kind of control: its effect, the controls' median, p and q.

    Columns: `layer matrix head expert role k dose treatment against effect controls p_value q_value`, a
    missing number of the place being -1.
    """
    import pandas as pd

    place = ["layer", "matrix", "head", "expert", "role", "k"]
    table = table.assign(**{name: table[name].fillna(-1) for name in ("layer", "head", "expert", "k")})
    found = table[table["quantity"] == f"{effect}_p_value"].rename(columns={"value": "p_value"})
    arms, keys = table[table["quantity"] == effect], [*place, "dose", "treatment"]
    treatments = arms[arms["draw"].isna()].set_index(keys)["value"]
    medians = arms.groupby(keys)["value"].median()
    q_values = table[table["quantity"] == f"{effect}_q_value"].set_index([*keys, "against"])["value"]
    for name, values, columns in (
        ("effect", treatments, keys),
        ("controls", medians, [*place, "dose", "against"]),
        ("q_value", q_values, [*keys, "against"]),
    ):
        found[name] = values.reindex(pd.MultiIndex.from_frame(found[columns])).to_numpy()
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
