"""Matrices that are edited together, by kind and by layer."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture, Kind, ResidualMatrix, chosen
from weightgeom.models.weights import difference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Matrices that are edited together, and their place in a table."""

    place: Mapping[str, Any]
    matrices: tuple[ResidualMatrix, ...]


def kinds_of(architecture: Architecture) -> list[Kind]:
    """The kinds of matrix that there are, in the order of a layer."""
    return list(dict.fromkeys(matrix.kind for matrix in architecture.matrices))


def reads_and_writes(architecture: Architecture) -> list[list[Kind]]:
    """The kinds that read, and those that write."""
    writing = {matrix.kind for matrix in architecture.matrices if matrix.role == "write"}
    kinds = kinds_of(architecture)
    return [[kind for kind in kinds if kind not in writing], [kind for kind in kinds if kind in writing]]


def grouped(
    architecture: Architecture, asked: Sequence[list[Kind]], layers: list[int] | None, key: str
) -> list[Group]:
    """The groups as the architecture has them.

    Raises:
        ValueError: for a layer or a kind that it does not have, or a group that is empty or named twice.
    """
    groups = [group_of(architecture, kinds, layers) for kinds in asked]
    for kinds, group in zip(asked, groups, strict=True):
        if not kinds:
            raise ValueError(f"a group of {key} names no matrix")
        if groups.count(group) > 1:
            raise ValueError(f"{key} has the group {kinds} twice")
    return groups


def group_of(architecture: Architecture, kinds: list[Kind], layers: list[int] | None) -> Group:
    """The matrices of these kinds in these layers; `matrix` is empty for all kinds of a role, or of both.

    Raises:
        ValueError: for a layer or a kind that the architecture does not have.
    """
    matrices = chosen(architecture, kinds, layers)
    roles = {matrix.role for matrix in matrices}
    role = roles.pop() if len(roles) == 1 else ""
    alike = [matrix.kind for matrix in architecture.matrices if role in ("", matrix.role)]
    named = [kind for kind in kinds_of(architecture) if kind in kinds]
    place = {"matrix": "" if set(named) == set(alike) else "+".join(named), "role": role}
    used = {matrix.layer for matrix in matrices}
    return Group(place if len(used) != 1 else {"layer": used.pop(), **place}, tuple(matrices))


def moved(setting: Setting, *lists: Sequence[Group]) -> list[list[Group]]:
    """The groups without the matrices that did not move, and without groups of which none did.

    Raises:
        ValueError: if none of all did.
    """
    update = difference(setting.end, setting.start, setting.model.architecture)
    matrices = {matrix for groups in lists for group in groups for matrix in group.matrices}
    moved = {matrix for matrix in matrices if bool(matrix.of(update).any())}
    if not moved:
        raise ValueError(
            f"none of the {len(matrices)} matrices asked for moved between the start and the end: there is no"
            " update to operate on"
        )
    if len(moved) < len(matrices):
        logger.warning(
            "%d of %d matrices did not move and are left out", len(matrices - moved), len(matrices)
        )
    kept = [
        [
            replace(group, matrices=tuple(matrix for matrix in group.matrices if matrix in moved))
            for group in groups
        ]
        for groups in lists
    ]
    return [[group for group in groups if group.matrices] for groups in kept]
