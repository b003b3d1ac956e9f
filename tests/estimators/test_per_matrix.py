# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import math
from dataclasses import dataclass

import pytest
import torch

from weightgeom.declarations import ProbeDeclaration
from weightgeom.estimators.per_matrix import PerMatrix, as_probe
from weightgeom.interfaces import Probe, Setting
from weightgeom.probes.rsf import RSF
from weightgeom.table import tabulate


@pytest.fixture
def setting(model, examples):
    start = {name: weight.detach().clone() for name, weight in model.network.state_dict().items()}
    return Setting(model, start, start, False, examples, 3)


@dataclass(frozen=True)
class Moved:
    headline = "norm"

    def of_matrix(self, before, after):
        change = after - before
        return {"norm": float(change.norm()), "share": float(change.norm() / change.norm())}


def test_every_residual_matrix_has_a_row_of_every_quantity(setting):
    probe = PerMatrix(Moved())
    assert isinstance(probe, Probe) and probe.declaration == ProbeDeclaration("norm", divisible=True)
    q, *others = setting.model.architecture.matrices
    moved = dict(setting.start) | {q.parameter: setting.start[q.parameter] + 1.0}
    table = tabulate({"step": 1, **row} for row in probe.measurement(setting)(moved))
    norms = table[table["quantity"] == "norm"]
    assert len(norms) == 1 + len(others)
    of_q = norms[(norms["matrix"] == q.label) & (norms["layer"] == q.layer)].iloc[0]
    assert of_q["role"] == q.role and of_q["n"] == q.of(setting.start).numel()
    assert of_q["value"] == pytest.approx(math.sqrt(of_q["n"]), rel=1e-4)
    assert set(table[table["quantity"] == "share"]["layer"]) == {q.layer}  # 0 / 0 where nothing moved


def test_an_unmoved_model_has_finite_rows_alone(setting):
    rows = PerMatrix(Moved()).measurement(setting)(setting.start)
    table = tabulate({"step": 0, **row} for row in rows)
    assert set(table["quantity"]) == {"norm"} and (table["value"] == 0).all()


def test_a_probe_stays_as_it_is_and_a_function_becomes_one():
    probe = RSF()
    assert as_probe(probe) is probe
    assert as_probe(Moved()) == PerMatrix(Moved())


def test_a_headline_that_is_no_name_is_refused():
    @dataclass(frozen=True)
    class Nameless(Moved):
        headline = ""

    with pytest.raises(
        ValueError, match=r"Nameless\.headline must be the name of a quantity of of_matrix, got ''"
    ):
        as_probe(Nameless())


def test_matrices_are_given_in_fp32(setting):
    seen = []

    @dataclass(frozen=True)
    class Types:
        headline = "any"

        def of_matrix(self, before, after):
            seen.append((before.dtype, after.dtype, before.ndim))
            return {"any": 1.0}

    PerMatrix(Types()).measurement(setting)({k: v.bfloat16() for k, v in setting.start.items()})
    assert set(seen) == {(torch.float32, torch.float32, 2)}
