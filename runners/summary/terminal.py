"""The tables of a run in short, in the terminal."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runners.summary.instances import of_instance
from runners.tracking.redaction import redacted_text
from weightgeom.analysis.chain import STAGES
from weightgeom.analysis.comparisons import compared_with_principal, measured_effect
from weightgeom.analysis.declared import declared, plain_name
from weightgeom.analysis.summaries import by_matrix, by_quantity, by_stage, by_treatment
from weightgeom.declarations import InterventionDeclaration
from weightgeom.interfaces import Intervention, Probe, Summarised
from weightgeom.table import PRETRAINING, of_matrices

if TYPE_CHECKING:
    import pandas as pd

TITLES = {"pretraining": PRETRAINING, "training": "", "between": ", each stage against the one before it"}
NUMBER = re.compile(r"-$|[-+]?\d")  # the start of a cell that is set to the right


def print_summary(
    tables: "Mapping[str, pd.DataFrame]",
    probes: Mapping[str, Probe],
    interventions: Mapping[str, Intervention],
    record: Path,
    tracking_uri: str,
) -> None:
    """The tables in short, and one line each for where the record is and how to open MLflow on it."""
    from rich import get_console
    from rich.table import Table

    console = get_console()
    shown = [
        *(part for name, probe in probes.items() for part in _of_probe(name, probe, tables)),
        *(
            effects_shown(name, tables[name], intervention.declaration)
            for name, intervention in interventions.items()
            if len(tables[name])
        ),
    ]
    for title, short in shown:
        if len(short):
            console.print(rendered(short, title, Table))
    claims = claims_shown(tables)
    if claims is not None:
        console.print(rendered(claims, "arXiv:2603.13911v1", Table))
    console.print(f"record: {record}", soft_wrap=True)
    location = redacted_text(tracking_uri)
    where = location if location.startswith("http") else f"mlflow ui --backend-store-uri {location}"
    console.print(f"MLflow: {where}", soft_wrap=True)


def rendered(short: "pd.DataFrame", title: str, make: type) -> object:
    """A table of text for the terminal; columns of numbers are set to the right."""
    table = make(*map(str, short.columns), title=title)
    cells = [[str(cell) for cell in row] for row in short.fillna("-").itertuples(index=False)]
    for column, values in zip(table.columns, zip(*cells, strict=True), strict=True):
        if all(map(NUMBER.match, values)):
            column.justify = "right"
    for row in cells:
        table.add_row(*row)
    return table


def _of_probe(
    name: str, probe: Probe, tables: "Mapping[str, pd.DataFrame]"
) -> "Iterator[tuple[str, pd.DataFrame]]":
    """Titles and tables of one instance; of a chain the comparison of its stages stands for the matrices."""
    mine = of_instance(name, tables)
    declaration = probe.declaration
    if STAGES in mine:
        label = declaration.label or declaration.headline.replace("_", " ")
        several = tables[STAGES]["probe"].nunique() > 1
        title = f"stages: {label} (z)" if "z" in set(mine[STAGES]["quantity"]) else f"stages: {label}"
        short = by_stage(mine[STAGES], declaration.headline, declaration.form)
        yield f"{title}, {name}" if several else title, short
        return
    for of, title in TITLES.items():
        if of not in mine:
            continue
        if isinstance(probe, Summarised):
            yield f"{name}{title}", probe.summary(mine[of])
        elif declaration.generic:
            if len(of_matrices(mine[of], declaration.headline)):
                yield f"{name}{title}", by_matrix(mine[of], declaration.headline, declaration.form)
            if (mine[of]["matrix"] == "").any():
                yield f"{name}{title}", by_quantity(mine[of])


def effects_shown(
    name: str, table: "pd.DataFrame", declaration: InterventionDeclaration
) -> "tuple[str, pd.DataFrame]":
    """Title and table of an intervention's comparisons with its principal controls."""
    effect = measured_effect(table, declaration.effects)
    kinds = compared_with_principal(table, effect, declaration.controls)["against"].unique()
    unit = table[table["quantity"] == effect]["unit"].iloc[0]
    title = f"{name}: {effect} ({unit}) beside the median of {' or '.join(kinds)} controls"
    return title, by_treatment(table, effect, declaration.controls)


def claims_shown(tables: "Mapping[str, pd.DataFrame]") -> "pd.DataFrame | None":
    """The claims of arXiv:2603.13911v1 with their verdicts; None if untested."""
    import pandas as pd

    from weightgeom.analysis.claims_uncertainty import lines, tables_of_claims

    declarations = {name: declared(name, table) for name, table in tables.items() if name == plain_name(name)}
    table, edited = tables_of_claims(tables, declarations)
    if table is None and not edited:
        return None
    trained = table is not None and bool(table.attrs.get("trained"))
    return pd.DataFrame([vars(line) for line in lines(table, list(edited.values()), trained)])
