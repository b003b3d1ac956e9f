"""Declarations of probes, objectives and interventions, for curves, figures, claims and the report."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from pydantic.dataclasses import dataclass

Role = Literal["contrast", "likelihood", "other"]
"""An objective contrasts responses, maximises the likelihood of tokens, or does neither."""

DECLARATION = "declaration"  # the key of a table's `attrs` under which it travels with the table

# Headings of the report's sections about the two papers. A table under one of them is read as theirs.
ASYMMETRY = "The asymmetry"
BEHAVIOUR = "What the trainings achieved"
MECHANISM = "The mechanism"
EDITS = "Rank-1 edits"
SURGERY = "Surgery on the update"
UNCERTAINTY = "Uncertainty: the companion paper"
SPECTRA = "Spectra"  # of the probe spectrum, a section of its figure alone
SECTIONS = (ASYMMETRY, BEHAVIOUR, MECHANISM, EDITS, SURGERY, UNCERTAINTY)


@dataclass(frozen=True)
class ProbeDeclaration:
    """The part of a probe that its table does not show.

    Curves are the mean of the `headline` over layers at every step, for each matrix, and every quantity
    without a matrix, or those in `whole`. Where rows `null_<headline>_mean` and `null_<headline>_sd` exist,
    summaries show the headline with this null. A headline with a `share` is given in multiples of chance, of
    at most headline / share; a run warns where its optimizer makes every such headline 1.
    """

    headline: str  # the quantity that stands for a matrix; "" if the probe measures whole models alone
    label: str = ""  # of the headline, on axes and in tables; "" for its name
    share: str = ""  # the quantity in [0, 1] that the headline is a multiple of, 1 being chance; "" for none
    form: str = ".3g"  # of the headline in tables
    section: str = ""  # the heading of its section in the report; "" for the name of its table
    whole: tuple[str, ...] = ()  # the quantities without a matrix that have curves; () for all
    by_layer: bool = True  # a profile over layers at the last step, as further curves
    of_pretraining: bool = False  # curves also of the base's past, and between the stages of a chain
    compares: bool = True  # measures a change from the start: has a meaning between two stages of a chain
    needs_objective: bool = False  # measures nothing where the objective is not known
    needs_update: bool = True  # says nothing about a single checkpoint
    generic: bool = True  # summaries and figures of the runner's own where the probe brings none
    divisible: bool = False  # of another checkpoint it needs at most the weights, as `Setting.before`
    harmless: tuple[str, ...] = ()  # fields that change no headline: runs that differ in them are alike


@dataclass(frozen=True)
class InterventionDeclaration:
    """The part of an intervention that its table does not show."""

    effects: tuple[str, ...]  # the effect that stands for a treatment, then those for data that lack it
    controls: tuple[str, ...]  # kinds of control by name, the one that summaries compare with first
    section: str = ""  # the heading of its section in the report; "" for the name of its table
    generic: bool = True  # figures of the runner's own where the intervention brings none
    needs_update: bool = False  # edits the update: there is nothing to edit in a single checkpoint


Declaration = ProbeDeclaration | InterventionDeclaration
KINDS = {"probe": ProbeDeclaration, "intervention": InterventionDeclaration}


def recorded(declaration: Declaration) -> dict[str, Any]:
    """The declaration as plain data, for a table's `attrs`."""
    (kind,) = (name for name, made in KINDS.items() if isinstance(declaration, made))
    return {"kind": kind, **asdict(declaration)}


def restored(plain: Mapping[str, Any]) -> Declaration:
    """The declaration that `recorded` has recorded; fields of other versions are passed over."""
    made = KINDS[plain["kind"]]
    names = {field.name for field in fields(made)}
    return made(**{name: value for name, value in plain.items() if name in names})
