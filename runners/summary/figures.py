"""Figures of a run, saved into its record as PNG and PDF."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from runners.disk import full_disk_explained
from runners.summary.instances import of_instance
from runners.tracking.record import Record
from weightgeom.analysis.comparisons import compared_with_principal, measured_effect
from weightgeom.analysis.declared import declared, in_section, plain_name
from weightgeom.declarations import ASYMMETRY, Declaration, InterventionDeclaration, ProbeDeclaration
from weightgeom.interfaces import Drawn, Intervention, Probe
from weightgeom.table import of_matrices, of_the_model

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def draw(
    tables: "Mapping[str, pd.DataFrame]",
    record: Record,
    probes: Mapping[str, Probe],
    interventions: Mapping[str, Intervention],
) -> None:
    """The figures that probes and interventions bring, or generic ones, as PNG and PDF, into the record.

    The first instance of a class has its figures under their own names; those of any other instance, and
    those whose name is taken, begin with the instance's name.
    """
    from weightgeom.figures.base import save

    drawn: set[str] = set()
    classes: set[type] = set()

    def put(name: str, figure: "Figure") -> None:
        drawn.add(name)
        with full_disk_explained(record.directory):
            save(figure, *(record.artifact(f"figures/{name}.{ending}") for ending in ("png", "pdf")))

    for instance, thing in {**interventions, **probes}.items():
        mine = of_instance(instance, tables)
        if not mine:
            continue
        if isinstance(thing, Drawn):
            for name, figure in thing.figures(mine).items():
                plain = type(thing) not in classes and name not in drawn
                put(name if plain else f"{instance}_{name}", figure)
        elif thing.declaration.generic:
            for name, figure in _generic(thing.declaration, mine):
                put(f"{instance}_{name}", figure)
        classes.add(type(thing))
    for name, figure in _of_uncertainty(tables, record):
        put(name, figure)


def _generic(
    declaration: Declaration, tables: "Mapping[str, pd.DataFrame]"
) -> "Iterator[tuple[str, Figure]]":
    if isinstance(declaration, InterventionDeclaration):
        return _of_intervention(declaration, tables["training"])
    return _of_probe(declaration, tables)


def _of_probe(
    declaration: ProbeDeclaration, tables: "Mapping[str, pd.DataFrame]"
) -> "Iterator[tuple[str, Figure]]":
    """The headline by step and by layer, of a chain by stage; whole quantities by step."""
    from weightgeom.figures import generic

    headline, label = declaration.headline, declaration.label or declaration.headline.replace("_", " ")
    rows = {name: of_matrices(table, headline) for name, table in tables.items()}
    if "stages" in tables:
        if len(rows["stages"]):
            yield "by_stage", generic.by_stage(tables["stages"], headline, label)
        return
    moved = {name: part for name, part in rows.items() if len(part)}
    if moved:
        yield "by_step", generic.by_step(moved, label)
        for name, part in moved.items():
            suffix = "_pretraining" if name == "pretraining" and len(moved) > 1 else ""
            sds = {end: of_matrices(tables[name], f"null_{headline}_{end}") for end in ("mean", "sd")}
            yield f"by_layer{suffix}", generic.by_layer(part, sds, label)
    whole = {name: of_the_model(table, headline) for name, table in tables.items()}
    if declaration.whole:
        whole = {name: part[part["quantity"].isin(declaration.whole)] for name, part in whole.items()}
    if whole := {name: part for name, part in whole.items() if len(part)}:
        yield "whole", generic.whole_by_step(whole)


def _of_intervention(
    declaration: InterventionDeclaration, table: "pd.DataFrame"
) -> "Iterator[tuple[str, Figure]]":
    from weightgeom.figures import generic

    effect = measured_effect(table, declaration.effects)
    compared = compared_with_principal(table, effect, declaration.controls)
    if len(compared):
        unit = table[table["quantity"] == effect]["unit"].iloc[0]
        yield "effects", generic.effects(compared, f"{effect.replace('_', ' ')} ({unit})")


def _of_uncertainty(tables: "Mapping[str, pd.DataFrame]", record: Record) -> "Iterator[tuple[str, Figure]]":
    """The figures over several tables of this section; its claims and the bridge are saved as tables."""
    from weightgeom.analysis.claims_uncertainty import lines, tables_of_claims

    declarations = {name: declared(name, table) for name, table in tables.items() if name == plain_name(name)}
    table, edited = tables_of_claims(tables, declarations)
    if table is None and not edited:
        return
    import pandas as pd

    from weightgeom.analysis.bridge import bridge
    from weightgeom.figures import uncertainty as figures

    trained = table is not None and bool(table.attrs.get("trained"))
    if edited:
        yield "abstentions", figures.abstentions(edited)
    ratios = [tables[name] for name in in_section(declarations, ASYMMETRY)]
    if trained and ratios:
        bridged = bridge(table, ratios[0])
        if len(bridged):
            yield "uncertainty_bridge", figures.bridge(bridged)
            bridged.to_csv(record.artifact("tables/bridge.csv"), index=False)
    claims = pd.DataFrame([vars(line) for line in lines(table, list(edited.values()), trained)])
    claims.to_csv(record.artifact("tables/claims_uncertainty.csv"), index=False)
