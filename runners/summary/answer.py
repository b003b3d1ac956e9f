"""The answer of a run in one sentence, from its probes' declarations and their tables."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from weightgeom.analysis.chain import BETWEEN, ENDS, SINGLE, STAGES
from weightgeom.declarations import ProbeDeclaration
from weightgeom.table import null_of_mean, of_matrices, of_the_model

if TYPE_CHECKING:
    import pandas as pd


def answer(tables: "Mapping[str, pd.DataFrame]", declarations: Mapping[str, ProbeDeclaration]) -> str:
    """Such as `read 5.3 times chance, write 1.3 times, of at most 8; null 1 ± 0.2`; "" without tables.

    It is about the first probe whose headline is a multiple of chance, or else the first with a headline, at
    the last step; of a chain about every stage against the one before it. The null stands next to two of its
    standard deviations, of the mean over layers and matrices (`null_of_mean`), those of the wider pathway.
    """
    for name in sorted(declarations, key=lambda name: not declarations[name].share):
        declaration = declarations[name]
        table = tables.get(name + BETWEEN, tables.get(name))
        if table is None or not declaration.headline or not (table["matrix"] != "").any():
            continue
        if not len(of_matrices(table, declaration.headline)):
            if SINGLE in table.attrs:
                continue
            return _nothing_moved(table)
        if name + BETWEEN in tables:
            return _of_chain(table, declaration)
        values, limits = _parts(table, int(table["step"].max()), declaration)
        return values + limits if values else _nothing_moved(table)
    whole = (line for name in declarations if name in tables for line in _of_whole(tables[name]))
    return "; ".join(line for _, line in zip(range(2), whole, strict=False))


def _nothing_moved(table: "pd.DataFrame") -> str:
    if ENDS in table.attrs:
        return f"the two checkpoints, {' and '.join(table.attrs[ENDS])}, are equal: no matrix differs"
    return "nothing moved: every matrix is as at the start"


def _of_chain(table: "pd.DataFrame", declaration: ProbeDeclaration) -> str:
    names, clauses, limits = table.attrs[STAGES], [], ""
    for step in sorted(set(map(int, table["step"])) - {0}):
        values, limit = _parts(table, step, declaration)
        clauses.append(f"{names[step]} after {names[step - 1]}: {values or 'equal, no matrix differs'}")
        limits = limit or limits
    return "; ".join(clauses) + limits


def _parts(table: "pd.DataFrame", step: int, declaration: ProbeDeclaration) -> tuple[str, str]:
    """The headline of every pathway, or matrix without one, at a step; and its maximum with the null."""
    headline, here = declaration.headline, table[table["step"] == step]
    rows = of_matrices(here, headline)
    if not len(rows):
        return "", ""
    means = rows.groupby(rows["role"].where(rows["role"] != "", rows["matrix"]), sort=False)["value"].mean()
    if not declaration.share:
        label = declaration.label or headline.replace("_", " ")
        shown = ", ".join(f"{part} {mean:{declaration.form}}" for part, mean in means.items())
        return f"{label}: {shown}", _null(here, headline)
    (first, mean), *others = means.items()
    shown = [f"{first} {mean:.1f} times chance", *(f"{part} {mean:.1f} times" for part, mean in others)]
    shares = of_matrices(here, declaration.share)
    both = rows.merge(shares, on=["layer", "matrix", "expert"], suffixes=("", "_share"))
    both = both[both["value_share"] > 0]
    most = f", of at most {(both['value'] / both['value_share']).median():.3g}" if len(both) else ""
    return ", ".join(shown), most + _null(here, headline)


def _null(table: "pd.DataFrame", headline: str) -> str:
    means, sds = (of_matrices(table, f"null_{headline}_{end}") for end in ("mean", "sd"))
    if not len(means) or not len(sds):
        return ""
    spreads = [
        null_of_mean(table, headline, part, role=role, matrix="", k=part["k"].min())
        for role, part in sds.groupby("role")
    ]
    return f"; null {means['value'].mean():.2g} ± {2 * max(filter(None, spreads), default=0.0):.1g}"


def _of_whole(table: "pd.DataFrame") -> "Iterator[str]":
    """Such as `heldout_ce from 6.5 to 5.25 nats/token`, of every quantity without a matrix; or its value."""
    whole = of_the_model(table)
    for quantity, part in whole.groupby("quantity", sort=False):
        first, last = (
            part[part["step"] == end]["value"].mean() for end in (part["step"].min(), table["step"].max())
        )
        unit = part["unit"].iloc[0]
        change = f"{last:.3g}" if SINGLE in table.attrs else f"from {first:.3g} to {last:.3g}"
        yield f"{quantity} {change}{'' if unit == '1' else f' {unit}'}"
