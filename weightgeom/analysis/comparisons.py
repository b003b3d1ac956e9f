"""Comparisons of an intervention's treatments with their matched controls."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportOperatorIssue=false, reportAssignmentType=false

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


MARGIN = "preference_margin_change"


def comparisons(table: "pd.DataFrame", effect: str) -> "pd.DataFrame":
    """A row for every treatment, dose and kind of control: its effect, the controls' median, p and q.

    Columns: `layer matrix head expert role subspace k dose treatment against effect controls p_value
    q_value`, a missing number of the place being -1.
    """
    import pandas as pd

    place = ["layer", "matrix", "head", "expert", "role", "subspace", "k"]
    table = table.assign(**{name: table[name].fillna(-1) for name in ("layer", "head", "expert", "k")})
    compared = table[table["quantity"] == f"{effect}_p_value"].rename(columns={"value": "p_value"})
    arms, keys = table[table["quantity"] == effect], [*place, "dose", "treatment"]
    treatments = arms[arms["draw"].isna()].set_index(keys)["value"]
    medians = arms.groupby(keys)["value"].median()
    q_values = table[table["quantity"] == f"{effect}_q_value"].set_index([*keys, "against"])["value"]
    for name, values, columns in (
        ("effect", treatments, keys),
        ("controls", medians, [*place, "dose", "against"]),
        ("q_value", q_values, [*keys, "against"]),
    ):
        compared[name] = values.reindex(pd.MultiIndex.from_frame(compared[columns])).to_numpy()
    columns = [*place, "dose", "treatment", "against", "effect", "controls", "p_value", "q_value"]
    return compared[columns].reset_index(drop=True)


def measured_effect(table: "pd.DataFrame", effects: Sequence[str]) -> str:
    """The first of the effects that the table has: data may lack the first, such as one of pairs.

    Raises:
        ValueError: if it has none of them.
    """
    measured = set(table["quantity"])
    for effect in effects:
        if effect in measured:
            return effect
    raise ValueError(
        f"none of the declared effects {', '.join(effects)} was measured; the table has"
        f" {', '.join(sorted(measured)) or 'no rows'}"
    )


def compared_with_principal(table: "pd.DataFrame", effect: str, controls: Sequence[str]) -> "pd.DataFrame":
    """The `comparisons` of an effect that summaries show."""
    return principal(comparisons(table, effect), controls)


def principal(compared: "pd.DataFrame", controls: Sequence[str]) -> "pd.DataFrame":
    """Comparisons with the first of the kinds of control that each has; of numerical doses the largest."""
    import pandas as pd

    order = {kind: number for number, kind in enumerate(controls)}
    ranks = compared["against"].map(lambda kind: order.get(kind, len(order)))
    compared = compared[ranks == ranks.groupby([compared["treatment"], compared["dose"]]).transform("min")]
    doses = pd.to_numeric(compared["dose"], errors="coerce")
    return compared[doses.isna() | (doses == doses.max())]
