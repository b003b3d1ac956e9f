"""The bridge of the two papers: does teaching abstention write, or read, and does the output then see it?"""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from math import hypot

import pandas as pd

from weightgeom.table import own

COUPLINGS = ("fisher_ratio", "gradient_coupling")


def bridge(uncertainty: pd.DataFrame, rsf: pd.DataFrame) -> pd.DataFrame:
    """The change of coupling from the first step to the last, and the RSF of the update behind it.

    A row for every layer, uncertain group, coupling and pathway, with `before`, `after`, `change` and its
    standard error, as of independent prompts (the prompts are the same, so it is the most that it can be),
    and `rsf`, the mean ratio over the layer's matrices of that pathway at the smallest k. Ours.
    """
    first, last = uncertainty["step"].min(), uncertainty["step"].max()
    rows = uncertainty[uncertainty["quantity"].isin(COUPLINGS) & (uncertainty["subspace"] == "residual")]
    index = ["layer", "arm", "quantity"]
    before, after = (rows[rows["step"] == step].set_index(index) for step in (first, last))
    ratios = own(rsf[rsf["step"] == last], "ratio").groupby(["layer", "role"])["value"].mean()
    bridged = []
    for (layer, arm, quantity), first_row in before.iterrows():
        last_row = after.loc[(layer, arm, quantity)]
        for role in ("read", "write"):
            if (layer, role) not in ratios.index:
                continue
            errors = [float(row["stderr"]) for row in (first_row, last_row)]
            values = {
                "before": first_row["value"],
                "after": last_row["value"],
                "change": last_row["value"] - first_row["value"],
            }
            place = {"layer": layer, "arm": arm, "quantity": quantity, "role": role}
            bridged.append({**place, **values, "stderr": hypot(*errors), "rsf": ratios[layer, role]})
    return pd.DataFrame(bridged)
