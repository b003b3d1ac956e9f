"""Checks of declarations before anything runs, and how they go into records and tables."""

import logging
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, get_args

from runners.pipeline.measurements import configured
from runners.summary.instances import names_of
from weightgeom.analysis.chain import STAGES
from weightgeom.analysis.declared import OF_TEXT, ROLE, UNDECLARED
from weightgeom.analysis.referee import REFEREE
from weightgeom.declarations import (
    DECLARATION,
    InterventionDeclaration,
    ProbeDeclaration,
    Role,
    recorded,
)
from weightgeom.interfaces import Intervention, KnownRole, Objective, Probe
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
MEMBERS = {
    "probe": (Probe, ProbeDeclaration, ("declaration", "check", "measurement"), " or headline and of_matrix"),
    "intervention": (Intervention, InterventionDeclaration, ("declaration", "check", "arms", "rows"), ""),
}
ROLES = get_args(Role)


def check_declarations(
    probes: Mapping[str, Probe], interventions: Mapping[str, Intervention], objective: Objective | None
) -> None:
    """Raise ValueError for a declaration that lacks or is of another type, and for two tables of one name."""
    for group, things in (("probe", probes), ("intervention", interventions)):
        for name, thing in things.items():
            _check_members(f"{group}.{name}", group, thing)
    if objective is not None and isinstance(objective, KnownRole) and objective.role not in ROLES:
        raise ValueError(
            f"objective: {type(objective).__name__}.role must be one of {', '.join(ROLES)}, got"
            f" {objective.role!r}"
        )
    owners = {STAGES: "the comparison of a chain's stages", REFEREE: "the verdicts on published claims"}
    for key, names in (
        *((f"probe.{name}", names_of(name)) for name in probes),
        *((f"intervention.{name}", [name]) for name in interventions),
    ):
        for name in names:
            if name in owners:
                group, _, short = key.partition(".")
                raise ValueError(
                    f"{key} and {owners[name]} both have a table named {name}: give the {group} another"
                    f" name, such as +{group}.{short}_2={{_target_: ...}}"
                )
            owners[name] = key


def warn_of_uninformative(probes: Mapping[str, Probe], training: Training) -> None:
    """Log a warning for every probe of shares whose headline is 1 whatever is trained, by the optimizer."""
    for name, probe in probes.items():
        declaration = probe.declaration
        if declaration.share and training.orthogonal:
            log.warning(
                "training.optimizer=%s gives all singular values of an update nearly one size, so %s of probe"
                " %s is about 1 for every matrix of full rank, whatever the model reads or writes: train by"
                " another optimizer to measure it",
                *(training.optimizer, declaration.headline, name),
            )


def _check_members(key: str, group: str, thing: object) -> None:
    protocol, made, members, otherwise = MEMBERS[group]
    name = type(configured(thing)).__name__
    if not isinstance(thing, protocol):
        lacking = [member for member in members if member not in dir(thing)]
        raise ValueError(
            f"{key}: {name} is no {group}, as it lacks {', '.join(lacking)}: a {group} has"
            f" {', '.join(members)}{otherwise}"
        )
    if not is_dataclass(configured(thing)):
        raise ValueError(f"{key}: {name} must be a dataclass, as its fields tell its tables apart")
    declaration: object = getattr(thing, "declaration", None)
    if not isinstance(declaration, made):
        raise ValueError(f"{key}: {name}.declaration must be a {made.__name__}, got {declaration!r}")
    if isinstance(declaration, InterventionDeclaration) and not declaration.effects:
        raise ValueError(
            f"{key}: {name}.declaration has no effects: name the effect that stands for a treatment"
        )


def objective_tags(objective: Objective | None, examples: Examples) -> dict[str, str]:
    """The tags of a run that name its kind of objective."""
    if objective is None:
        return {}
    if not isinstance(objective, KnownRole):
        return {ROLE: UNDECLARED}
    return {ROLE: objective.role, OF_TEXT: str(objective.of_text(examples)).lower()}


def with_declaration(table: "pd.DataFrame", thing: Probe | Intervention) -> "pd.DataFrame":
    """The table with the declaration of its probe or intervention as an attribute."""
    table.attrs[DECLARATION] = recorded(thing.declaration)
    return table
