from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError

from weightgeom.analysis.declared import EARLIER, declared, in_section, of_text, role
from weightgeom.declarations import (
    ASYMMETRY,
    DECLARATION,
    UNCERTAINTY,
    InterventionDeclaration,
    ProbeDeclaration,
    recorded,
    restored,
)
from weightgeom.interventions.rank1 import Rank1
from weightgeom.interventions.surgery import DeltaSurgery
from weightgeom.probes.rsf import RSF
from weightgeom.table import of_matrices, row, tabulate

DECLARATIONS = (
    ProbeDeclaration("gap", label="the gap", section="Norms", whole=("a", "b"), harmless=("tokens",)),
    InterventionDeclaration(("margin", "kl"), ("random", "bottom"), "Edits"),
)


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_a_declaration_travels_with_its_table(declaration, tmp_path: Path):
    table = tabulate([row("gap", 1.0, n=1, step=0)])
    table.attrs[DECLARATION] = recorded(declaration)
    table.to_parquet(tmp_path / "mine.parquet")
    assert declared("mine", pd.read_parquet(tmp_path / "mine.parquet")) == declaration


def test_a_field_of_another_version_is_passed_over():
    assert restored({**recorded(DECLARATIONS[0]), "later": 1}) == DECLARATIONS[0]


def test_a_declaration_of_the_wrong_type_is_refused_where_it_is_made():
    with pytest.raises(ValidationError, match="headline"):
        ProbeDeclaration(headline=3)  # pyright: ignore[reportArgumentType]


def test_a_table_of_before_is_declared_by_its_name():
    table = tabulate([])
    assert declared("rsf_pretraining", table) is EARLIER["rsf"]
    assert declared("rsf_stages", table) is EARLIER["rsf"]
    assert declared("unknown", table) == ProbeDeclaration("")
    assert in_section(EARLIER, UNCERTAINTY) == ["uncertainty", "steer", "bypass", "repair"]


def test_tables_of_before_are_declared_as_those_of_today():
    assert EARLIER["rsf"] == ProbeDeclaration(
        **{
            name: getattr(RSF.declaration, name)
            for name in ("headline", "label", "share", "form", "section", "harmless")
        }
    )
    assert in_section(EARLIER, ASYMMETRY) == ["rsf"]
    assert EARLIER["rank1"].section == Rank1().declaration.section
    assert EARLIER["surgery"].section == DeltaSurgery().declaration.section


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"objective._target_": "a.DPO"}, "contrast"),
        ({"objective._target_": "a.GradedContrastive", "objective.level": "token"}, "other"),
        ({"objective._target_": "a.CE"}, "likelihood"),
        ({"objective._target_": "mylab.SimPO"}, "undeclared"),
        ({"objective._target_": "None"}, ""),
    ],
)
def test_a_role_is_the_recorded_one_or_for_runs_of_before_that_of_the_class(params, expected):
    assert role(params, {}) == expected
    if expected:
        assert role(params, {"objective.role": "contrast"}) == "contrast"


def test_the_recorded_part_of_the_data_counts_before_the_parameters():
    params = {"objective.on": "auto", "data": "world"}
    assert of_text(params, {}) and not of_text(params, {"objective.of_text": "false"})


def test_rows_of_matrices_need_no_subspace():
    at = {"step": 1, "layer": 0, "role": "read"}
    whole = row("gap", 2.0, n=1, matrix="q", **at)
    others = [row("gap", 9.0, n=1, matrix="q", head=0, **at), row("gap", 9.0, n=1, step=1)]
    assert of_matrices(tabulate([whole, *others]), "gap")["value"].tolist() == [2.0]
    inside = row("gap", 3.0, n=1, matrix="q", subspace="prediction", k=4, **at)
    assert of_matrices(tabulate([whole, inside, *others]), "gap")["value"].tolist() == [3.0]
