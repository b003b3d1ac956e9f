"""Tables in short, as text: the last step against the first, treatments against controls, stage by stage."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from weightgeom.analysis.chain import ENDS, STAGES
from weightgeom.analysis.comparisons import compared_with_principal
from weightgeom.table import (
    at_own_subspaces,
    given_name,
    label,
    null_of_mean,
    of_matrices,
    of_the_model,
    whole_matrices,
)

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = {"effect": "effect", "controls": "controls", "p": "p_value", "q": "q_value"}  # of a comparison


def by_matrix(table: "pd.DataFrame", headline: str, form: str = ".3g") -> "pd.DataFrame":
    """A row for every pathway, matrix and k: the headline's mean over layers at its first and last step.

    One column where the two are one step, and no k where it has one value. Next to the null, where the table
    has one, and z, its distance from the null in standard deviations of that mean (`null_of_mean`).
    """
    import pandas as pd

    values = _at_every_k(table, headline)
    last, first = int(table["step"].max()), int(values["step"].min())
    null = {end: _at_every_k(table, f"null_{headline}_{end}") for end in ("mean", "sd")}
    several, name = values["k"].nunique() > 1, headline.replace("_", " ")
    rows = []
    for (role, matrix, k), part in values.groupby(["role", "matrix", "k"], sort=False):
        end = part[part["step"] == last]
        if not len(end):
            continue
        mean = end["value"].mean()
        row = {"pathway": str(role), "matrix": str(matrix)}
        if several:
            row["k"] = str(k)
        if first == last:
            row[name] = f"{mean:{form}}"
        else:
            start = part[part["step"] == first]["value"].mean()
            row |= {f"{name} at step {first}": f"{start:{form}}", f"at step {last}": f"{mean:{form}}"}
        if len(null["sd"]):
            means, sds = (_at(rows, matrix, k, last) for rows in null.values())
            place = {"role": role, "matrix": matrix, "step": last} | ({"k": k} if k >= 0 else {})
            centre, spread = means["value"].mean(), null_of_mean(table, headline, sds, **place)
            row["null"] = "-" if spread is None else f"{centre:.3g} ± {spread:{form}}"
            row["z"] = f"{(mean - centre) / spread:.1f}" if spread else "-"
        rows.append(row)
    return pd.DataFrame(rows)


def by_head(table: "pd.DataFrame", headline: str, form: str = ".3g") -> "pd.DataFrame":
    """A row for every matrix that is measured by head or by expert: the range over heads at the last step.

    Every head of every layer counts by itself, at the smallest k.
    """
    import pandas as pd

    parts = table[(table["quantity"] == headline) & (table["step"] == table["step"].max())]
    parts = parts[(parts["head"].notna() | parts["expert"].notna()) & (parts["subspace"] != "random")]
    if parts["k"].notna().any():
        parts = parts[parts["k"] == parts["k"].min()]
    rows = []
    for (role, matrix), part in parts.groupby(["role", "matrix"], sort=False):
        kind = "head" if part["head"].notna().all() else "expert"
        highest = part.loc[part["value"].idxmax()]
        rows.append({
            "pathway": str(role), "matrix": str(matrix),
            "parts": f"{part[kind].nunique()} {kind}s",
            "lowest": f"{part['value'].min():{form}}", "median": f"{part['value'].median():{form}}",
            "highest": f"{highest['value']:{form}}",
            "in": f"layer {highest['layer']}, {kind} {highest[kind]}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def unmoved(table: "pd.DataFrame") -> "pd.DataFrame":
    """A row for every matrix of a table without headlines, as nothing moved: the quantities that it has."""
    import pandas as pd

    last = whole_matrices(table[(table["step"] == table["step"].max()) & (table["matrix"] != "")])
    last = last[last["subspace"] == ""]
    return pd.DataFrame([
        {"pathway": str(role), "matrix": str(matrix)}
        | {
            str(quantity).replace("_", " "): f"{values.mean():.3g}"
            for quantity, values in part.groupby("quantity", sort=False)["value"]
        }
        for (role, matrix), part in last.groupby(["role", "matrix"], sort=False)
    ])  # fmt: skip


def by_quantity(table: "pd.DataFrame") -> "pd.DataFrame":
    """A row for every quantity without a matrix: its mean at the first and last step, or at every stage."""
    import pandas as pd

    table = of_the_model(table)
    names = table.attrs.get(STAGES, table.attrs.get(ENDS))  # of a chain or a pair all steps, by their names
    steps = list(dict.fromkeys((table["step"].min(), table["step"].max())))
    if names is not None:
        steps = sorted(table["step"].unique())
    rows = []
    for quantity, part in table.groupby("quantity", sort=False):
        row = {"quantity": str(quantity)}
        for step in steps:
            head = f"step {step}" if names is None else names[step]
            row[head] = _estimate(part[part["step"] == step])
        rows.append({**row, "unit": part["unit"].iloc[0]})
    return pd.DataFrame(rows)


def by_expectation(table: "pd.DataFrame", expected: Sequence[str]) -> "pd.DataFrame":
    """Matrix by pathway: expected and measured ratio, and the correlations of the two, at the last step."""
    import pandas as pd

    last = table[table["step"] == table["step"].max()]
    names = [*expected, "measured"]
    means = {
        name: of_matrices(last, f"{name}_ratio").groupby(["role", "matrix"], sort=False)["value"].mean()
        for name in names
    }
    rows = []
    for role, matrix in means["measured"].index:
        values = {name: means[name].get((role, matrix)) for name in names}
        cells = {name: "-" if value is None else f"{value:.2f}" for name, value in values.items()}
        rows.append({"pathway": role, "matrix": matrix, **cells})
    for role in ("read", "write") if len(table) else ():
        row = {"pathway": role, "matrix": "correlation"}
        for name in expected:
            values = last[last["quantity"] == f"{role}_{name}_correlation"]["value"]
            row[name] = f"{values.iloc[0]:.2f}" if len(values) else "-"
        rows.append({**row, "measured": "1"})
    return pd.DataFrame(rows)


def by_stage(table: "pd.DataFrame", headline: str, form: str = ".3g") -> "pd.DataFrame":
    """A row for every stage and the one it is compared with: the mean headline of every matrix, and its z.

    `table` has one probe's rows of `side_by_side`.
    """
    import pandas as pd

    means = table[table["layer"].isna()]
    matrices = list(dict.fromkeys(zip(means["matrix"], means["role"], strict=True)))
    rows = []
    for (stage, against), part in means.groupby(["stage", "against"], sort=False):
        values = part.set_index(["matrix", "quantity"])["value"]
        row = {"stage": stage, "against": against}
        for matrix, role in matrices:
            row[f"{matrix} ({role})" if role else matrix] = _cell(values, matrix, headline, form)
        norms = part[part["quantity"] == "delta_norm"]["value"]
        if len(norms):
            row["‖dW‖"] = f"{sqrt((norms**2).sum()):.3g}"
        rows.append(row)
    return pd.DataFrame(rows)


def by_treatment(table: "pd.DataFrame", effect: str, controls: Sequence[str]) -> "pd.DataFrame":
    """Comparisons of an intervention with its principal controls, and the remainder beyond its parts."""
    import pandas as pd

    compared = compared_with_principal(table, effect, controls)
    rows = [
        {
            "matrix": " in ".join(
                filter(None, [row["matrix"] or row["role"] or "all", given_name(row["subspace"])])
            ),
            **{key: "-" if row[key] < 0 else str(int(row[key])) for key in ("layer", "k")},
            "treatment": f"{row['treatment']}@{row['dose']}",
            **{
                head: f"{row[key]:.3g}" for head, key in NUMBERS.items()
            },
        }
        for _, row in compared.assign(matrix=label(compared)).iterrows()
    ]  # fmt: skip
    missing = dict.fromkeys(("layer", "k", *NUMBERS), "-")
    for value in table[table["quantity"] == f"{effect}_interaction"]["value"]:
        rows.append({"matrix": "all", **missing, "treatment": "interaction", "effect": f"{value:.3g}"})
    return pd.DataFrame(rows)


def _at_every_k(table: "pd.DataFrame", quantity: str) -> "pd.DataFrame":
    """Rows of one quantity of whole matrices at their own subspaces, or those without; -1 for no k."""
    rows = at_own_subspaces(table[table["quantity"] == quantity])
    rows = rows if len(rows) else of_matrices(table, quantity)
    return rows.assign(k=rows["k"].fillna(-1))


def _at(rows: "pd.DataFrame", matrix: object, k: object, step: int) -> "pd.DataFrame":
    return rows[(rows["matrix"] == matrix) & (rows["k"] == k) & (rows["step"] == step)]


def _estimate(rows: "pd.DataFrame") -> str:
    """The value with its standard error; the mean, where layers or groups have one each."""
    if len(rows) != 1:
        return f"{rows['value'].mean():.3g}" if len(rows) else "-"
    return " ± ".join(f"{number:.3g}" for number in rows.iloc[0][["value", "stderr"]].dropna())


def _cell(values: "pd.Series", matrix: str, headline: str, form: str) -> str:
    if (matrix, headline) not in values.index:
        return "unmoved"
    z = f" ({values[matrix, 'z']:.1f})" if (matrix, "z") in values.index else ""
    return f"{values[matrix, headline]:{form}}{z}"
