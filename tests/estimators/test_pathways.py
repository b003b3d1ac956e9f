"""Means over a pathway against rotations of its whole update, and against the nulls of single matrices."""

import pytest
import torch

from weightgeom.estimators.pathways import Pathways
from weightgeom.estimators.reference_subspaces import Frame, place_of
from weightgeom.geometry.nulls import rotation_null, spectrum_shares
from weightgeom.geometry.subspace import Subspace
from weightgeom.table import row

D, K = 32, 4


@pytest.fixture
def measured(model, generator) -> tuple[dict, dict]:
    """The rows of a model whose updates share two directions, by place, and the shares of each matrix."""
    common = torch.randn(2, D, generator=generator)
    pathways, ratios, grams, frames = Pathways([K], D, 0), [], {}, {}
    for matrix in model.architecture.matrices:
        place = place_of(matrix)
        if place not in frames:
            frames[place] = Frame(place, Subspace.random(D, K, generator))
        update = torch.randn(6, 2, generator=generator) @ common
        update = update + torch.randn(6, D, generator=generator) / 2
        gram, space = update.T @ update, frames[place].space
        pathways.add(matrix, gram, frames[place])
        at = {**matrix.table_columns, "subspace": place[0], "k": K}
        ratios.append(row("ratio", space.explained(gram) * D / K, n=1, **at))
        grams[matrix.name] = (matrix, gram, space)
    rows = list(pathways.rows(ratios))
    return {(row["role"], row["matrix"], row["quantity"]): row for row in rows}, grams


def test_the_mean_is_that_of_the_matrices_and_is_of_all_of_them(measured):
    rows, grams = measured
    for role in ("read", "write"):
        shares = [space.explained(gram) for matrix, gram, space in grams.values() if matrix.role == role]
        row = rows[role, "", "ratio_mean"]
        assert row["value"] == pytest.approx(sum(shares) / len(shares) * D / K)
        assert row["n"] == len(shares) and row["layer"] is None
    assert rows["read", "q", "ratio_mean"]["subspace"] == "attention_input"
    assert rows["read", "", "ratio_mean"]["subspace"] == ""  # of two kinds of inputs
    assert rows["write", "", "ratio_mean"]["subspace"] == "prediction"


@pytest.mark.parametrize("role", ["read", "write"])
def test_its_sd_is_that_of_rotations_of_the_whole_update(measured, role, generator):
    rows, grams = measured
    mine = [
        (gram.double() / gram.trace(), space) for matrix, gram, space in grams.values() if matrix.role == role
    ]
    rotations = torch.linalg.qr(torch.randn(4000, D, D, generator=generator, dtype=torch.float64)).Q
    means = torch.zeros(4000, dtype=torch.float64)
    for gram, space in mine:
        turned = rotations @ space.basis
        means += torch.einsum("nik,ij,njk->n", turned, gram, turned) * D / K / len(mine)
    assert rows[role, "", "ratio_mean_null_sd"]["value"] == pytest.approx(float(means.std()), rel=0.05)
    value = rows[role, "", "ratio_mean"]["value"]
    sd = rows[role, "", "ratio_mean_null_sd"]["value"]
    assert rows[role, "", "ratio_mean_z"]["value"] == pytest.approx((value - 1) / sd)
    if role == "write":
        p = rows[role, "", "ratio_mean_p_value"]
        share = float((means >= value).double().mean())
        assert p["value"] == pytest.approx(share, abs=4 * p["stderr"] + 0.02)
    else:
        assert (role, "", "ratio_mean_p_value") not in rows


def test_of_writes_it_is_the_rotation_null_of_the_mean_gram_matrix(measured):
    rows, grams = measured
    for kind in ("o", "down"):
        mine = [gram.double() / gram.trace() for matrix, gram, _ in grams.values() if matrix.kind == kind]
        null = rotation_null(spectrum_shares(torch.stack(mine).mean(0)), K, 0)
        sd = rows["write", kind, "ratio_mean_null_sd"]["value"]
        assert sd == pytest.approx(null.sd * D / K)
