"""The sweep's own record: one table of its runs' results, and the figure over their sharpness."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.disk import full_disk_explained
from runners.summary.note import note
from runners.tracking.record import Record
from weightgeom.analysis.chain import STAGES
from weightgeom.analysis.declared import declared, of_text, plain_name
from weightgeom.analysis.evidence import rank_correlation
from weightgeom.analysis.over_seeds import MEASURES
from weightgeom.analysis.referee import REFEREE
from weightgeom.declarations import ASYMMETRY, SECTIONS, ProbeDeclaration
from weightgeom.table import of_matrices, upgraded

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
SHARPNESS, ALTERNATIVES = "train/participation_ratio", "train/alternatives"
# A run as a whole: the last value of these metrics, or the mean where it is a curve.
LAST = ("train/matched_tokens", "train/delta_norm", "train/heldout_accuracy", "train/loss")
MEAN = (SHARPNESS, "train/target_energy", ALTERNATIVES)


def summarise(record: Record, children: Sequence[Path]) -> None:
    """Write the table `sweep`, one number of one run a row, its figures and a note in words into `record`.

    Columns: `run` (what tells it from the others but its seed), the parameters in which the runs differ,
    `matrix`, `role`, `quantity`, `value`. Runs that did not finish are left out, and counted in the log.
    """
    import pandas as pd

    done = [child for child in map(Record, children) if _finished(child)]
    if len(done) < len(children):
        log.warning("%d of %d runs did not finish: the sweep's table is without them", *(
            len(children) - len(done), len(children)
        ))  # fmt: skip
    varied = _varied(done)
    rows = [
        {"run": _label(child, varied), **{key: child.description()["params"][key] for key in varied}, **row}
        for child in done
        for row in _rows(child)
    ]
    table = pd.DataFrame(rows, columns=None if rows else ["run", "quantity"])
    corpus = {_label(child, varied) for child in done if _of_text(child)}
    correlations = _drawn(record, table, corpus) if rows else {}
    record.tag("mlflow.note.content", note(record, list(map(Record, children)), table, correlations))


def _drawn(record: Record, table: "pd.DataFrame", corpus: set[str]) -> dict[str, tuple[float, float]]:
    """Save the table and the figures; of the graded control, return the rank correlations.

    The graded control is of one data set, the responses: without the runs trained on the `corpus`.
    """
    from weightgeom.figures import base as figures

    with full_disk_explained(record.directory):
        table.to_parquet(record.artifact("tables/sweep.parquet"))
        table.to_csv(record.artifact("tables/sweep.csv"), index=False)
    if (table["quantity"] == "ratio").any():
        save(record, "ratio_by_run", figures.ratio_by_run(table))
    for quantity in dict.fromkeys(table["quantity"][table["matrix"] != ""]):
        probe, _, headline = quantity.partition("/")
        rows = table[(table["quantity"] == quantity) & table["matrix"].isin(list(figures.COLOURS))]
        if headline and len(rows):
            name = headline.replace("_", " ")
            save(record, f"{probe}_by_run", figures.ratio_by_run(rows, quantity, f"{name} ({probe})", None))
    family = table[~table["run"].isin(corpus)]
    graded = (family["quantity"] == SHARPNESS).any() and family["run"].nunique() > 2
    return _graded(record, family) if graded else {}


def _graded(record: Record, table: "pd.DataFrame") -> dict[str, tuple[float, float]]:
    """The graded control: ratio against measured sharpness, and Spearman's correlation of the two."""
    from weightgeom.figures import base as figures

    wide = sharpness_and_ratios(table)
    measure = MEASURES[wide.attrs["measure"].removeprefix("train/")]
    correlations = {}
    for role in ("read", "write"):
        correlations[role] = rank_correlation(wide[wide["role"] == role])
        record.log({
            f"graded_control/{role}_rank_correlation": correlations[role][0],
            f"graded_control/{role}_p_value": correlations[role][1],
        }, 0)  # fmt: skip
        log.info("%s ratio and %s: rank correlation %.2f (p = %.2g)", role, measure, *correlations[role])
    save(
        record, "graded_control", figures.ratio_by_sharpness(wide, correlations, measure.removeprefix("the "))
    )
    return correlations


def save(record: Record, name: str, figure: "Figure") -> None:
    """Put a figure into the record, as PNG and PDF."""
    from weightgeom.figures import base as figures

    with full_disk_explained(record.directory):
        figures.save(figure, *(record.artifact(f"figures/{name}.{ending}") for ending in ("png", "pdf")))


def sharpness_and_ratios(table: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each run, seed and role: its measured sharpness and its ratio, the mean over the matrices.

    The sharpness is the effective number of alternatives where all runs have one, else the participation
    ratio; the attribute `measure` is the name of its curve.
    """
    keys = ["run", "seed"] if "seed" in table else ["run"]
    parts = {name: table[table["quantity"] == name] for name in (ALTERNATIVES, SHARPNESS)}
    measure = ALTERNATIVES if len(parts[ALTERNATIVES]) == len(parts[SHARPNESS]) else SHARPNESS
    sharpness = parts[measure].set_index(keys)["value"].rename("sharpness")
    ratios = table[table["quantity"] == "ratio"].groupby([*keys, "role"])["value"].mean().rename("ratio")
    wide = ratios.reset_index().merge(sharpness.reset_index(), on=keys)
    wide.attrs["measure"] = measure
    return wide


def _rows(child: Record) -> Iterator[dict[str, Any]]:
    for quantity, table in _headlines(child):
        for (role, matrix), part in table.groupby(["role", "matrix"]):
            yield {"matrix": matrix, "role": role, "quantity": quantity, "value": part["value"].mean()}
    curves: dict[str, list[float]] = {}
    for points, _ in child.batches(0, 1000):  # none of a piece
        for point in points:
            curves.setdefault(point.key, []).append(point.value)
    for key in (*LAST, *MEAN):
        if key in curves:
            value = curves[key][-1] if key in LAST else sum(curves[key]) / len(curves[key])
            yield {"matrix": "", "role": "", "quantity": key, "value": value}


def _headlines(child: Record) -> "Iterator[tuple[str, pd.DataFrame]]":
    """The headline of every probe at the last step of a training, by `ratio` or `<table>/<headline>`.

    The first table of the section on the asymmetry has the name `ratio`, by which sweeps are compared.
    """
    import pandas as pd

    named = False
    for path in sorted((child.directory / "artifacts/tables").glob("*.parquet")):
        if path.stem != plain_name(path.stem) or path.stem in (STAGES, REFEREE):
            continue
        table = upgraded(pd.read_parquet(path))
        declaration = declared(path.stem, table)
        if not isinstance(declaration, ProbeDeclaration) or not declaration.generic:
            continue
        rows = of_matrices(table[table["step"] == table["step"].max()], declaration.headline)
        if declaration.section == ASYMMETRY and not named:
            named = True
            yield declaration.headline, rows
        elif declaration.section == ASYMMETRY or declaration.section not in SECTIONS:
            yield f"{path.stem}/{declaration.headline}", rows


def _of_text(child: Record) -> bool:
    described = child.description()
    return of_text(described["params"], described["tags"])


def _finished(child: Record) -> bool:
    return child.described() and child.status().get("status") == "FINISHED"


def _varied(done: Sequence[Record]) -> list[str]:
    params = [child.description()["params"] for child in done]
    keys = dict.fromkeys(key for parameters in params for key in parameters)
    return [
        key
        for key in keys
        if len({parameters.get(key) for parameters in params}) > 1 and all(key in p for p in params)
    ]


def _label(child: Record, varied: Sequence[str]) -> str:
    """A run's name among the others, without its seed: its objective, then the other keys that vary."""
    params = child.description()["params"]
    chosen = "objective" in varied  # by name, which stands for all its keys
    keys = [
        key
        for key in varied
        if key not in ("objective", "seed") and not (chosen and key.startswith("objective."))
    ]
    return " ".join([params["objective"]] * (chosen or not keys) + [f"{key}={params[key]}" for key in keys])
