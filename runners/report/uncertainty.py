"""A study's results on the companion paper, arXiv:2603.13911v1: its claims, its figures and the bridge."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightgeom.analysis.declared import EARLIER, in_section
from weightgeom.declarations import ASYMMETRY, UNCERTAINTY, Declaration

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BASE = ["model", "data", "model_seed", "data_seed", "seed"]
COUPLINGS = {
    "fisher_ratio": "Fisher sensitivity over that of random directions",
    "gradient_coupling": "cosine with the gradient of abstaining",
}


@dataclass(frozen=True)
class Companion:
    """`claims` has a row for every base, claim and group; `bridge` one for every training and layer.

    `measured` are the tables of every base by its name, as a run has them.
    """

    claims: "pd.DataFrame"
    bridge: "pd.DataFrame"
    measured: Mapping[str, "Mapping[str, pd.DataFrame]"]
    declarations: Mapping[str, Declaration]


def companion(rows: "pd.DataFrame", declarations: Mapping[str, Declaration] = EARLIER) -> Companion | None:
    """The results in the rows that `collect` gives; None if no run measured any.

    The claims are about a base, whose numbers do not depend on what is trained from it: of several runs of
    one base and seed, the newest that has a table counts.
    """
    import pandas as pd

    from weightgeom.analysis.claims_uncertainty import lines, tables_of_claims

    asked = rows[rows["table"].isin(in_section(declarations, UNCERTAINTY))]
    if not len(asked):
        return None
    measured, claims = {}, []
    for key, part in asked.groupby(BASE, sort=False, dropna=False):
        name = _name(dict(zip(BASE, key, strict=True)), asked)
        measured[name] = _tables(part)
        table, edited = tables_of_claims(measured[name], declarations)
        claims += [
            {"setting": name, **vars(line)} for line in lines(table, list(edited.values()), _trained(table))
        ]
    return Companion(pd.DataFrame(claims), _bridges(rows, declarations), measured, declarations)


def illustrated(companion: Companion) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    """Section, file name, figure, caption, and whether it is folded away; the figures of the first base."""
    from weightgeom.analysis.claims_uncertainty import base_step, tables_of_claims
    from weightgeom.figures import uncertainty as figures_uncertainty

    name, tables = next(iter(companion.measured.items()))
    section, more = (
        "uncertainty",
        f" ({len(companion.measured)} bases in the tables)" * (len(companion.measured) > 1),
    )
    table, edited = tables_of_claims(tables, companion.declarations)
    if table is not None:
        step = base_step(table, _trained(table))
        yield (
            section, "uncertainty_profiles", figures_uncertainty.profiles(table, step),
            f"{name}{more}: how the groups of prompts differ in the residual stream, by layer: the"
            " intrinsic dimension of each, then uncertain against factual ones. Bars are 95 % intervals; the"
            " dashed line is no difference, or chance.", False,
        )  # fmt: skip
        yield (
            section, "uncertainty_sensitivity", figures_uncertainty.sensitivity(table, step),
            f"{name}: how much the prediction changes along the boundary between the groups, against random"
            " directions (grey) and the top output directions (dotted).", False,
        )  # fmt: skip
        yield (
            section, "uncertainty_topology", figures_uncertainty.topology(table, step),
            f"{name}: components of the groups' states by cosine distance, persistence entropy and the"
            " longest loop. Bars are 95 % intervals from half-samples.", True,
        )  # fmt: skip
    if edited:
        yield (
            section, "abstentions", figures_uncertainty.abstentions(edited),
            f"{name}: abstention gained on uncertain prompts against false abstention on factual ones, as the"
            " strength of an edit of the states grows. Grey: edits along random directions of equal size."
            " Above the dashed line more is gained than lost.", False,
        )  # fmt: skip
    if len(companion.bridge):
        yield (
            "bridge", "bridge", figures_uncertainty.bridge(companion.bridge),
            "The bridge between the two papers: how the coupling of the boundary to the output changed while"
            " abstention was taught, against where the same update lies. A point is a training (the mean over"
            " layers); circles read, squares write.", False,
        )  # fmt: skip


def _tables(part: "pd.DataFrame") -> "dict[str, pd.DataFrame]":
    """The tables of one base, under the names that a run gives them; of every table the newest run's."""
    trained = set(part.loc[part["trajectory"] == "training", "table"])
    tables = {}
    for (table, trajectory), rows in part.groupby(["table", "trajectory"], sort=False):
        suffix = "_pretraining" if trajectory == "pretraining" and table in trained else ""
        tables[f"{table}{suffix}"] = rows[rows["run_id"] == rows["run_id"].iloc[-1]]
    return tables


def _trained(table: "pd.DataFrame | None") -> bool:
    return table is not None and bool(table["trajectory"].iloc[0] == "training")


def _name(base: Mapping[str, object], rows: "pd.DataFrame") -> str:
    """As short as tells the bases apart, such as `tiny · world, seed 0`."""
    varied = [key for key in ("model_seed", "data_seed") if rows[key].nunique() > 1]
    seeds = [f"{key.replace('_', ' ')} {base[key]}" for key in (*varied, "seed")]
    return f"{base['model']} · {', '.join([str(base['data']), *seeds])}"


def _bridges(rows: "pd.DataFrame", declarations: Mapping[str, Declaration]) -> "pd.DataFrame":
    """The bridge of every training with both an uncertainty and an rsf table, with `run` and `seed`."""
    import pandas as pd

    from weightgeom.analysis.bridge import bridge
    from weightgeom.analysis.claims_uncertainty import tables_of_claims

    parts = []
    trained = rows[(rows["trajectory"] == "training") & (rows["objective"] != "none")]
    for _, part in trained.groupby("run_id", sort=False):
        measured = {name: rows for name, rows in part.groupby("table", sort=False)}
        table, _ = tables_of_claims(measured, declarations)
        ratios = [measured[name] for name in in_section(declarations, ASYMMETRY) if name in measured]
        if table is not None and ratios:
            first = part.iloc[0]
            run = " · ".join(name for name in (first["objective"], first["variant"]) if name)
            bridged = bridge(table, ratios[0])
            parts.append(bridged.assign(run=run, seed=first["seed"], run_id=first["run_id"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
