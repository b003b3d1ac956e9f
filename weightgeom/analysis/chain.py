"""A chain of stages: its measurable comparisons, and the one table and figure that set them side by side."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

from weightgeom.table import COLUMNS, null_of_mean, of_matrices, whole_matrices

if TYPE_CHECKING:
    import pandas as pd


BETWEEN = "_stages"  # the suffix of the tables that compare every stage with the one before it
STAGES = "stages"  # the table and the figure of all comparisons
ENDS = "ends"  # the key of a table's `attrs` with the names of the two checkpoints of a pair
SINGLE = "single"  # the key of the `attrs` of a table that is about one checkpoint, without an update


def between(pairs: "Sequence[pd.DataFrame]") -> "pd.DataFrame":
    """The ends of pairs, each a stage and the one before, as one table whose step numbers the stage."""
    import pandas as pd

    ends = [pair[pair["step"] == 1].assign(step=number) for number, pair in enumerate(pairs, 1)]
    return pd.concat(ends, ignore_index=True)


def comparisons(
    name: str, table: "pd.DataFrame", names: Sequence[str]
) -> "Iterator[tuple[str, str, pd.DataFrame]]":
    """The rows of a table of a chain by the two of its stages that they compare, with those of step 0.

    `names` are the stages'; `name`, the table's own, says whether they are compared with the first or with
    the one before. The comparison of the first two is in both tables, and comes once.
    """
    for step in range(2 if name.endswith(BETWEEN) else 1, len(names)):
        start = step - 1 if name.endswith(BETWEEN) else 0
        yield names[start], names[step], table[table["step"].isin([0, step])]


def side_by_side(tables: "Mapping[str, pd.DataFrame]", headlines: Mapping[str, str]) -> "pd.DataFrame":
    """The table `stages`: every row about a headline, behind `probe`, `stage` and `against`, its reference.

    `headlines` has those of the probes that compare, by the name of their tables. Each has a row for every
    layer and one without a layer, the mean over them, and over experts, `n` their number;
    `null_<headline>_sd` and `z` are of that mean (`null_of_mean`);
    `<headline>_low` and `<headline>_high` are the means of the layers' ends, as if all layers rose and fell
    with the prompts together, which errs on the wide side. `delta_norm` is the norm over all layers.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for probe, headline in headlines.items():
        of_headline = [
            *(headline, f"{headline}_low", f"{headline}_high"),
            *(f"null_{headline}_mean", f"null_{headline}_sd", "z", "p_value", "q_value"),
        ]
        joint = f"{headline}_mean_null_sd"
        for name in (probe, f"{probe}{BETWEEN}"):
            table = tables[name]
            sizes = whole_matrices(table[table["quantity"] == "delta_norm"])
            parts = [*(of_matrices(table, quantity) for quantity in of_headline), sizes]
            kept = pd.concat([*parts, table[table["quantity"] == joint]])
            for against, stage, both in comparisons(name, kept, table.attrs[STAGES]):
                place = {"probe": probe, "stage": stage, "against": against}
                both = both[both["step"] != 0]
                mine = both[both["quantity"] != joint]
                rows += [{**row, **place} for row in mine.to_dict("records")]
                for _, matrix in mine.groupby(["matrix", "role"], sort=False):
                    rows += [{**row, **place} for row in _over_layers(matrix, headline, both)]
    # There are no arms here: `against` is a stage.
    columns = dict.fromkeys(["probe", "stage", "against", *COLUMNS])
    return pd.DataFrame(rows, columns=list(columns)).astype(COLUMNS)


def _over_layers(part: "pd.DataFrame", headline: str, everything: "pd.DataFrame") -> Iterator[dict[str, Any]]:
    """The rows of one matrix over all layers; `everything` has those of the joint nulls as well."""
    by_name = dict(iter(part.groupby("quantity", sort=False)))
    if "delta_norm" in by_name:
        sizes = by_name["delta_norm"]
        place = {"layer": None, "expert": None, "stderr": None}
        first = sizes.iloc[0].to_dict() | place | {"subspace": "", "k": None}
        norm = sqrt((sizes["value"] ** 2).sum())
        yield first | {"quantity": "delta_norm", "value": norm, "n": int(sizes["n"].sum())}
    if headline not in by_name:  # nothing moved
        return
    values, n = by_name[headline], len(by_name[headline])
    first = values.iloc[0].to_dict() | {"layer": None, "expert": None, "stderr": None, "n": n}
    mean = values["value"].mean()
    yield first | {"quantity": headline, "value": mean}
    for end in (f"{headline}_low", f"{headline}_high"):
        if end in by_name and len(by_name[end]) == n:
            yield first | {"quantity": end, "value": by_name[end]["value"].mean()}
    if f"null_{headline}_mean" not in by_name:
        return
    null, sds = by_name[f"null_{headline}_mean"]["value"].mean(), by_name[f"null_{headline}_sd"]
    place = {column: first[column] for column in ("role", "matrix", "k")}
    sd = null_of_mean(everything, headline, sds, **place)
    yield first | {"quantity": f"null_{headline}_mean", "value": null, "unit": first["unit"]}
    yield first | {"quantity": f"null_{headline}_sd", "value": sd}
    if sd:
        yield first | {"quantity": "z", "value": (mean - null) / sd, "unit": "1"}
