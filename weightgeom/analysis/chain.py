"""A chain of stages: what can be measured of it, and the one table and figure that set them side by side."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


BETWEEN = "_stages"  # the suffix of the tables that compare every stage with the one before it
STAGES = "stages"  # the table and the figure of all comparisons


def between(pairs: "Sequence[pd.DataFrame]") -> "pd.DataFrame":
    """The ends of pairs, each a stage and the one before, as one table whose step numbers the stage."""
    import pandas as pd

    ends = [pair[pair["step"] == 1].assign(step=number) for number, pair in enumerate(pairs, 1)]
    return pd.concat(ends, ignore_index=True)


def comparisons(
    name: str, table: "pd.DataFrame", names: Sequence[str]
) -> "Iterator[tuple[str, str, pd.DataFrame]]":
    """The rows of a table of a chain by the two of its stages that they compare, with those of step 0.

    `names` are the stages'; the table's own says with what they are compared. The first stage stands beside
    the base in both of its tables, and comes once.
    """
    for step in range(2 if name.endswith(BETWEEN) else 1, len(names)):
        start = step - 1 if name.endswith(BETWEEN) else 0
        yield names[start], names[step], table[table["step"].isin([0, step])]


def side_by_side(tables: "Mapping[str, pd.DataFrame]") -> "pd.DataFrame":
    """The table `stages`: a stage, the one it is compared `against`, then the columns of a probe's table.

    Every ratio has a row for each layer and one without a layer, the mean over them: its `stderr` is over
    layers, `n` their number; `null_ratio_sd` and `z` are of that mean, layers being independent under the
    null; `ratio_low` and `ratio_high` are the means of the layers' ends, as if all layers rose and fell with
    the prompts together, which errs on the wide side. `delta_norm` is the norm over all layers.
    """
    import pandas as pd

    from weightgeom.table import COLUMNS, own, whole_matrices

    wanted = [
        "ratio",
        "ratio_low",
        "ratio_high",
        "null_ratio_mean",
        "null_ratio_sd",
        "z",
        "p_value",
        "q_value",
    ]
    rows: list[dict[str, Any]] = []
    for name in ("rsf", f"rsf{BETWEEN}"):
        table = tables[name]
        whole = pd.concat([own(table, quantity) for quantity in wanted])
        sizes = whole_matrices(table[table["quantity"] == "delta_norm"])
        kept = pd.concat([whole, sizes])
        for against, stage, both in comparisons(name, kept, table.attrs[STAGES]):
            place = {"stage": stage, "against": against}
            mine = both[both["step"] != 0]
            rows += [{**row, **place} for row in mine.to_dict("records")]
            for _, matrix in mine.groupby(["matrix", "role"], sort=False):
                rows += [{**row, **place} for row in _over_layers(matrix)]
    # There are no arms here: `against` is a stage.
    columns = dict.fromkeys(["stage", "against", *COLUMNS])
    return pd.DataFrame(rows, columns=list(columns)).astype(COLUMNS)


def _over_layers(part: "pd.DataFrame") -> Iterator[dict[str, Any]]:
    """What the rows of one matrix in all layers come to."""
    by_name = dict(iter(part.groupby("quantity", sort=False)))
    first = part.iloc[0].to_dict() | {"layer": None, "stderr": None}
    sizes = by_name["delta_norm"]
    norm = {"quantity": "delta_norm", "value": sqrt((sizes["value"] ** 2).sum()), "n": int(sizes["n"].sum())}
    yield first | norm | {"subspace": "", "k": None}
    if "ratio" not in by_name:  # nothing moved
        return
    ratio, n = by_name["ratio"], len(by_name["ratio"])
    first = ratio.iloc[0].to_dict() | {"layer": None, "stderr": None, "n": n}
    mean, null = ratio["value"].mean(), by_name["null_ratio_mean"]["value"].mean()
    sd = sqrt((by_name["null_ratio_sd"]["value"] ** 2).sum()) / n
    error = ratio["value"].std() / sqrt(n) if n > 1 else None
    yield first | {"quantity": "ratio", "value": mean, "stderr": error}
    for end in ("ratio_low", "ratio_high"):
        if end in by_name and len(by_name[end]) == n:
            yield first | {"quantity": end, "value": by_name[end]["value"].mean()}
    yield first | {"quantity": "null_ratio_mean", "value": null}
    yield first | {"quantity": "null_ratio_sd", "value": sd}
    if sd > 0:
        yield first | {"quantity": "z", "value": (mean - null) / sd}
