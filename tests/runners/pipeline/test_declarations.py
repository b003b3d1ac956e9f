# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import small

from runners.pipeline.declarations import (
    check_declarations,
    objective_tags,
    warn_of_uninformative,
    with_declaration,
)
from runners.pipeline.measurements import plain
from weightgeom.analysis.declared import declared
from weightgeom.declarations import InterventionDeclaration, ProbeDeclaration
from weightgeom.estimators.per_matrix import PerMatrix
from weightgeom.interventions.rank1 import Rank1
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.graded_contrastive import GradedContrastive
from weightgeom.objectives.grpo import GRPO
from weightgeom.objectives.kto import KTO
from weightgeom.probes.moments import Moments
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum
from weightgeom.table import tabulate
from weightgeom.training.config import Training


@dataclass(frozen=True)
class Gap:
    declaration: ClassVar = ProbeDeclaration("gap")
    scale: float = 1.0

    def check(self, architecture):
        pass

    def measurement(self, setting):
        return lambda params: []


@dataclass(frozen=True)
class Edges:
    scale: float = 1.0
    headline = "edge"

    def of_matrix(self, before, after):
        return {"edge": 1.0}


def refused(match, probes=None, interventions=None, objective=None):
    with pytest.raises(ValueError, match=match):
        check_declarations(probes or {}, interventions or {}, objective)


def test_the_built_in_ones_and_two_instances_of_one_class_are_right():
    probes = {"rsf": RSF(), "rsf16": RSF(k=16), "gap": Gap(), "edges": PerMatrix(Edges())}
    check_declarations(probes, {"rank1": Rank1()}, DPO())


def test_a_run_warns_of_shares_under_an_optimizer_that_makes_them_all_chance(caplog):
    @dataclass(frozen=True)
    class Shares(Gap):
        declaration: ClassVar = ProbeDeclaration("multiple", share="portion")

    probes = {"gap": Gap(), "mine": Shares()}
    warn_of_uninformative(probes, Training(optimizer="lion"))
    assert not caplog.messages
    warn_of_uninformative(probes, Training(optimizer="muon"))
    (message,) = caplog.messages
    assert message.startswith("training.optimizer=muon gives all singular values")
    assert "so multiple of probe mine is about 1 for every matrix of full rank" in message
    real: Any = {"rsf": RSF(), "moments": Moments()}
    warn_of_uninformative(real, Training(optimizer="muon"))
    assert len(caplog.messages) == 2 and "ratio of probe rsf" in caplog.messages[1]


def test_a_class_without_a_declaration_is_refused_with_all_members():
    @dataclass(frozen=True)
    class Bare:
        def check(self, architecture):
            pass

    refused(
        r"^probe\.bare: Bare is no probe, as it lacks declaration, measurement: a probe has declaration,"
        r" check, measurement or headline and of_matrix$",
        {"bare": Bare()},
    )
    refused(
        r"intervention\.bare: Bare is no intervention, as it lacks .*, arms, rows", None, {"bare": Bare()}
    )


def test_a_declaration_of_another_type_is_refused():
    @dataclass(frozen=True)
    class Text(Gap):
        declaration: ClassVar = "gap"

    refused(r"probe\.x: Text\.declaration must be a ProbeDeclaration, got 'gap'", {"x": Text()})


def test_a_class_without_fields_of_its_own_is_refused():
    class Plain:
        declaration = ProbeDeclaration("gap")
        check = measurement = Gap.check

    refused(r"probe\.x: Plain must be a dataclass, as its fields tell its tables apart", {"x": Plain()})


def test_an_intervention_needs_an_effect():
    class Silent(Rank1):
        declaration = InterventionDeclaration((), ())

    refused(r"intervention\.x: Silent\.declaration has no effects", None, {"x": Silent()})


def test_two_tables_of_one_name_are_refused():
    refused(
        r"intervention\.rsf and probe\.rsf both have a table named rsf: give the intervention another name,"
        r" such as \+intervention\.rsf_2=",
        {"rsf": RSF()},
        {"rsf": Rank1()},
    )
    refused(
        r"probe\.rsf_pretraining and probe\.rsf both have a table named rsf_pretraining",
        {"rsf": RSF(), "rsf_pretraining": RSF()},
    )
    refused(r"probe\.stages and the comparison of a chain's stages both have a table", {"stages": Gap()})


def test_an_unknown_role_is_refused():
    class Odd(DPO):
        role = "contrastive"

    refused(
        r"objective: Odd\.role must be one of contrast, likelihood, other, got 'contrastive'", objective=Odd()
    )


@pytest.mark.parametrize(
    ("objective", "role", "of_text"),
    [
        (DPO(), "contrast", "false"),
        (KTO(), "contrast", "false"),
        (GRPO(), "other", "false"),
        (CE(), "likelihood", "true"),  # the world has text
        (CE(train_on="chosen"), "likelihood", "false"),
        (GradedContrastive(), "contrast", "false"),
        (GradedContrastive(level="token", tau=0.0), "likelihood", "true"),
        (GradedContrastive(level="token", tau=0.1, train_on="chosen"), "other", "false"),
    ],
)
def test_a_run_records_the_role_of_its_objective(objective, role, of_text):
    tags = objective_tags(objective, small.WORLD.examples())
    assert tags == {"objective.role": role, "objective.of_text": of_text}


def test_an_objective_without_a_role_is_recorded_as_undeclared():
    assert objective_tags(Gap(), small.WORLD.examples()) == {"objective.role": "undeclared"}  # pyright: ignore
    assert objective_tags(None, small.WORLD.examples()) == {}


def test_a_table_is_told_the_declaration_of_its_instance():
    table = with_declaration(tabulate([]), Spectrum(of=["weight"]))
    assert declared("any", table) == replace(Spectrum().declaration, headline="")


def test_a_function_of_two_matrices_is_specified_by_its_own_class_and_fields():
    assert plain(PerMatrix(Edges(2.0))) == {"class": f"{__name__}.Edges", "scale": 2.0}
