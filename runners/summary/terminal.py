"""The tables of a run in short, in the terminal."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runners.summary.commands import open_mlflow
from runners.summary.instances import of_instance
from runners.tracking.publisher import Published
from weightgeom.analysis.chain import SINGLE, STAGES
from weightgeom.analysis.comparisons import compared_with_principal, measured_effect
from weightgeom.analysis.declared import declared, plain_name
from weightgeom.analysis.referee import REFEREE, VERDICTS, counted, measured
from weightgeom.analysis.summaries import by_head, by_matrix, by_quantity, by_stage, by_treatment, unmoved
from weightgeom.declarations import InterventionDeclaration, ProbeDeclaration
from weightgeom.interfaces import Intervention, Probe, Summarised
from weightgeom.models.byte_ranges import Traffic
from weightgeom.table import of_matrices, of_the_model

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table as RichTable

TITLES = {
    "pretraining": ", in the pretraining",
    "training": "",
    "between": ", each stage against the one before it",
}
CONTINUED = ", continued"
LONGEST = 32  # characters of a word or number that are not broken
NUMBER = re.compile(r"-$|[-+]?\d")  # the start of a cell that is set to the right


@dataclass(frozen=True)
class End:
    """The last lines of a run: `answer`, `warnings`, and the commands that go on from its `record`.

    `fetched` counts the bytes of remote checkpoints.
    """

    answer: str
    warnings: Sequence[str]
    record: Path
    tracking_uri: str
    next_command: str = ""
    fetched: Traffic | None = None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Heads and texts; paths and commands are whole lines, to be copied."""
        if self.answer:
            yield "answer", self.answer
        for warning in self.warnings:
            yield "warning", warning
        if self.fetched is not None and self.fetched.requests:
            fetched, requests, repeated = (f"{count:,}" for count in self.fetched)
            yield (
                "fetched",
                f"{fetched} bytes of remote checkpoints, by {requests} requests and {repeated} repetitions",
            )
        figures = self.record / "artifacts/figures"
        if figures.is_dir():
            yield "figures", str(figures)
        yield "record", str(self.record)
        published = Published.load(self.record)
        command, *address = open_mlflow(
            self.tracking_uri, None if published is None else published.experiment_id
        )
        yield "MLflow", command
        if address:
            yield "then open", address[0]
        if self.next_command:
            yield "next", self.next_command


def print_summary(
    tables: "Mapping[str, pd.DataFrame]",
    probes: Mapping[str, Probe],
    interventions: Mapping[str, Intervention],
    end: End,
) -> None:
    """The tables in short, and the end."""
    from rich import get_console
    from rich.text import Text

    console = get_console()
    shown = [
        *(part for name, probe in probes.items() for part in _of_probe(name, probe, tables)),
        *(
            effects_shown(name, tables[name], intervention.declaration)
            for name, intervention in interventions.items()
            if len(tables[name])
        ),
    ]
    claims = claims_shown(tables)
    if claims is not None:
        shown.append(("Claims of arXiv:2603.13911v1", claims))
    if REFEREE in tables:
        shown.append((f"Published claims: {counted(tables[REFEREE])}", judged_shown(tables[REFEREE])))
    for title, short in shown:
        if len(short):
            for table in fitting(short, title, console):
                console.print(table)
    styles = {"answer": "bold", "warning": "yellow"}
    for head, text in end.lines():
        whole = head not in styles or not console.is_terminal  # paths and commands, to be copied
        console.print(Text(f"{head}: {text}", styles.get(head, "")), soft_wrap=whole)


def fitting(short: "pd.DataFrame", title: str, console: "Console") -> "Iterator[RichTable]":
    """The table in as many pieces as the console's width asks for, each with the columns of text."""
    from rich.measure import Measurement
    from rich.table import Table

    keys = [column for column in short.columns if not _is_number(short[column])]
    numbers = [column for column in short.columns if column not in keys]
    unbounded = console.options.update(max_width=10**6)  # a measurement is cut to the width that there is
    while True:
        for count in range(len(numbers), -1, -1):
            part = [column for column in short.columns if column in (*keys, *numbers[:count])]
            table = rendered(short[part], title, Table)
            size = Measurement.get(console, unbounded, table)
            if count <= 1 or size.minimum <= console.width:
                for column in table.columns if size.maximum > console.width else ():
                    if column.justify == "right":
                        column.width = column.min_width  # the words have the rest
                yield table
                numbers = numbers[count:]
                break
        if not numbers:
            return
        title = f"{title.removesuffix(CONTINUED)}{CONTINUED}"


def rendered(short: "pd.DataFrame", title: str, make: "type[RichTable]") -> "RichTable":
    """A table of text for the terminal; columns of numbers are set to the right.

    In a narrow terminal heads and texts are broken, words and numbers are not.
    """
    from rich.text import Text

    lines = any("\n" in str(cell) for cell in short.to_numpy().flat)  # between the rows
    table = make(*map(str, short.columns), title=Text(title), show_lines=lines)  # brackets would be markup
    for column, name in zip(table.columns, short.columns, strict=True):
        whole = short[name].fillna("-").astype(str)
        parts = list(whole)
        if _is_number(short[name]):
            column.justify = "right"
        else:
            parts = [word for cell in whole for word in cell.split()]
        column.min_width = min(LONGEST, max(map(len, (*str(name).split(), *parts))))
    for row in short.fillna("-").itertuples(index=False):
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _is_number(cells: "pd.Series") -> bool:
    return all(NUMBER.match(str(cell)) for cell in cells.fillna("-"))


def title_of(name: str, declaration: ProbeDeclaration) -> str:
    """Such as `Relative subspace fraction (rsf)`."""
    heading = declaration.label or declaration.section
    title = f"{heading} ({name})" if heading else name.replace("_", " ")
    return title[0].upper() + title[1:]


def _of_probe(
    name: str, probe: Probe, tables: "Mapping[str, pd.DataFrame]"
) -> "Iterator[tuple[str, pd.DataFrame]]":
    """Titles and tables of one instance; of a chain the comparison of its stages stands for the matrices."""
    mine = of_instance(name, tables)
    declaration = probe.declaration
    title, headline = title_of(name, declaration), declaration.headline
    if STAGES in mine:
        z = ", with z in brackets" if "z" in set(mine[STAGES]["quantity"]) else ""
        yield f"{title}, by stage{z}", by_stage(mine[STAGES], headline, declaration.form)
        if isinstance(probe, Summarised):
            names, table = mine["between"].attrs[STAGES], mine["between"]
            for step, part in table.groupby("step"):
                yield f"{title}, {names[step]} after {names[step - 1]}", probe.summary(part)
        return
    for of, rest in TITLES.items():
        if of not in mine:
            continue
        table = mine[of]
        if SINGLE in table.attrs:
            title = f"The checkpoint ({name})"
        if isinstance(probe, Summarised):
            yield f"{title}{rest}", probe.summary(table)
        elif declaration.generic:
            if len(of_matrices(table, headline)):
                yield f"{title}{rest}", by_matrix(table, headline, declaration.form)
                yield f"{title}{rest}, by head", by_head(table, headline, declaration.form)
            elif headline and (table["matrix"] != "").any():
                yield f"{title}{rest}: nothing moved", unmoved(table)
            if len(whole := of_the_model(table, headline)):
                yield f"{title}{rest}", by_quantity(whole)


def effects_shown(
    name: str, table: "pd.DataFrame", declaration: InterventionDeclaration
) -> "tuple[str, pd.DataFrame]":
    """Title and table of an intervention's comparisons with its principal controls."""
    effect = measured_effect(table, declaration.effects)
    kinds = compared_with_principal(table, effect, declaration.controls)["against"].unique()
    unit = table[table["quantity"] == effect]["unit"].iloc[0]
    heading = declaration.section or name.replace("_", " ").capitalize()
    title = f"{heading} ({name}): {effect} ({unit}) against the median of {' or '.join(kinds)} controls"
    return title, by_treatment(table, effect, declaration.controls)


def judged_shown(verdicts: "pd.DataFrame") -> "pd.DataFrame":
    """The verdicts of the referee, each with the claim, the published number, ours, the null's, and why."""
    import pandas as pd

    several = verdicts["update"].nunique() > 1
    rows = []
    for _, verdict in verdicts.iterrows():
        numbers = {name: measured(verdict, name) for name in ("ours", "null")}
        claim = [
            f"{verdict['statement']} ({verdict['paper']})",
            verdict["published"] and f"published: {verdict['published']}",
            ", ".join(f"{name}: {number}" for name, number in numbers.items() if number != "-"),
            verdict["detail"],
        ]
        update = {"update": verdict["update"]} if several else {}
        rows.append({"verdict": verdict["verdict"], **update, "claim": "\n".join(filter(None, claim))})
    return pd.DataFrame(rows).sort_values("verdict", key=_order, kind="stable", ignore_index=True)


def _order(verdict: "pd.Series") -> "pd.Series":
    return verdict.map(VERDICTS.index)


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
