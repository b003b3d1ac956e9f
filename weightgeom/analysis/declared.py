"""The declarations of runs' tables and objectives, read back; for earlier runs, taken from their names."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightgeom.analysis.chain import BETWEEN
from weightgeom.declarations import (
    ASYMMETRY,
    BEHAVIOUR,
    DECLARATION,
    EDITS,
    MECHANISM,
    SPECTRA,
    SURGERY,
    UNCERTAINTY,
    Declaration,
    InterventionDeclaration,
    ProbeDeclaration,
    restored,
)
from weightgeom.table import MEANS, PARAMETERS, PRETRAINING

if TYPE_CHECKING:
    import pandas as pd

Params = Mapping[str, str]
ROLE, OF_TEXT, CLASS = "objective.role", "objective.of_text", "objective._target_"  # tags, and a parameter
UNDECLARED = "undeclared"  # the role of an objective that has declared none

# Of tables that were written before tables had a declaration, by their names.
EARLIER: Mapping[str, Declaration] = {
    "rsf": ProbeDeclaration(
        "ratio",
        label="relative subspace fraction",
        share="fraction",
        form=".2f",
        section=ASYMMETRY,
        harmless=("budget_gb", "products", "frames"),
    ),
    "behaviour": ProbeDeclaration("", section=BEHAVIOUR, generic=False),
    "moments": ProbeDeclaration("measured_ratio", section=MECHANISM),
    "spectrum": ProbeDeclaration("delta_participation_ratio", section=SPECTRA, generic=False),
    "overlap": ProbeDeclaration("rotation", generic=False),
    "uncertainty": ProbeDeclaration("", section=UNCERTAINTY, generic=False),
    "rank1": InterventionDeclaration(("kl_from_unedited",), (), EDITS),
    "surgery": InterventionDeclaration(("preference_margin_change", "kl_from_unedited"), (), SURGERY),
    **{
        name: InterventionDeclaration(("abstention_change",), ("random",), UNCERTAINTY, generic=False)
        for name in ("steer", "bypass", "repair")
    },
}


def plain_name(name: str) -> str:
    """The name of the probe or intervention that a table is of."""
    whole = name.removesuffix(MEANS).removesuffix(PARAMETERS)
    return whole.removesuffix(PRETRAINING).removesuffix(BETWEEN)


def declared(name: str, table: "pd.DataFrame") -> Declaration:
    """The declaration of a table: its own, or for one of before that of its name."""
    if DECLARATION in table.attrs:
        return restored(table.attrs[DECLARATION])
    return EARLIER.get(plain_name(name), ProbeDeclaration(""))


def in_section(declarations: Mapping[str, Declaration], section: str) -> list[str]:
    """The names of the tables that belong to a section of the report, in their order."""
    return [name for name, declaration in declarations.items() if declaration.section == section]


def role(params: Params, tags: Params) -> str:
    """The role of a run's objective; "" without one."""
    kind = params.get(CLASS, "").rpartition(".")[2]
    if kind in ("", "None"):
        return ""
    return tags.get(ROLE) or _earlier_role(kind, params)


def of_text(params: Params, tags: Params) -> bool:
    """Whether a run has trained on the corpus, and not on responses."""
    if OF_TEXT in tags:
        return tags[OF_TEXT] == "true"
    part = params.get("objective.train_on", params.get("objective.on"))  # the key's earlier name
    return part == "text" or (part == "auto" and params["data"] in ("world", "text"))


def _earlier_role(kind: str, params: Params) -> str:
    """By the name of the class, for runs that have not recorded a role."""
    if kind in ("DPO", "KTO") or (
        kind == "GradedContrastive" and params.get("objective.level") == "sequence"
    ):
        return "contrast"
    graded = (params.get("objective.level"), params.get("objective.negatives"), params.get("objective.tau"))
    if kind == "CE" or (kind == "GradedContrastive" and graded == ("token", "None", "0.0")):
        return "likelihood"
    return "other" if kind == "GradedContrastive" else UNDECLARED
