from typing import Any

import numpy as np
import pytest
import torch
from unchecked import unchecked

from weightgeom.estimators import rotation
from weightgeom.estimators.rotation import rotation_test
from weightgeom.geometry.subspace import Subspace

answer = unchecked(rotation).rotation_test  # with arguments of any type


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An update of 12 x 20 and a basis of 3 directions of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 20, generator=generator), Subspace.random(20, 3, generator).basis


def test_an_update_inside_the_subspace_has_the_fraction_one_and_one_outside_zero():
    update, basis = tensors()
    inside = update.double() @ basis @ basis.T
    test = rotation_test(inside, basis, side="read")
    # d/k = 20/3 is the largest ratio, and 1/(1 + 999) the smallest p.
    assert test.fraction == pytest.approx(1) and test.ratio == pytest.approx(20 / 3)
    assert test.p_value == 0.001 and test.null_mean == 3 / 20
    assert test.z == pytest.approx((1 - test.null_mean) / test.null_sd)
    outside = rotation_test(update.double() - inside, basis, side="read")
    assert outside.fraction == pytest.approx(0, abs=1e-12) and outside.p_value == 1


def test_the_write_side_is_the_read_side_of_the_transpose():
    update, basis = tensors()
    assert rotation_test(update.T, basis, side="write") == rotation_test(update, basis, side="read")


def test_tensors_arrays_and_subspaces_give_one_answer_and_stay_as_they_are():
    update, basis = tensors()
    expected = rotation_test(update, Subspace(basis), side="read", seed=3)
    assert rotation_test(update.numpy(), basis.numpy(), side="read", seed=3) == expected
    learnt = update.clone().requires_grad_()
    assert rotation_test(learnt, basis, side="read", seed=3) == expected
    assert learnt.requires_grad and learnt.grad is None and torch.equal(learnt, update)
    fixed = update.numpy().copy()
    fixed.flags.writeable = False
    assert rotation_test(fixed, basis.flip(1).numpy()[:, ::-1], side="read", seed=3) == expected


def test_a_rotation_test_of_noise_is_as_often_below_a_level_as_the_level_says():
    p_values = torch.tensor([rotation_test(*tensors(seed), side="read").p_value for seed in range(200)])
    # Uniform: the share below 0.3 of 200 has the sd √(0.3 · 0.7 / 200) = 0.032; the bound is four of those.
    assert abs(float((p_values < 0.3).float().mean()) - 0.3) < 0.13


def test_a_basis_that_is_not_orthonormal_is_refused_or_orthonormalised():
    update, basis = tensors()
    skew = basis @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 1.0]]).double()
    with pytest.raises(ValueError, match=r"the columns of U are not orthonormal \(UᵀU differs .* by 9\)"):
        rotation_test(update, skew, side="read")
    straight = rotation_test(update, skew, side="read", orthonormalise=True)
    assert straight.fraction == pytest.approx(rotation_test(update, basis, side="read").fraction)
    assert rotation_test(update, basis.float(), side="read").fraction == pytest.approx(straight.fraction)
    with pytest.raises(ValueError, match="the columns of U are not orthonormal"):
        rotation_test(update, basis.bfloat16(), side="read")
    dependent = torch.cat([basis, basis[:, :1]], 1)
    with pytest.raises(ValueError, match="the 4 columns of U span 3 dimensions: give linearly independent"):
        rotation_test(update, dependent, side="read", orthonormalise=True)


@pytest.mark.parametrize(
    ("shape", "side", "mend"),
    [
        ((3, 20), "read", r"give U\.T, with a direction in each column"),
        ((12, 3), "read", "take side='write'"),
        ((20, 3), "write", "take side='read'"),
        ((7, 3), "write", "give a basis of 12 rows"),
    ],
)
def test_a_basis_of_the_other_side_is_refused(shape: tuple[int, int], side: Any, mend: str):
    update, _ = tensors()
    basis = torch.linalg.qr(torch.randn(*sorted(shape, reverse=True))).Q
    axis = "input side of dW, of shape (12, 20), has 20" if side == "read" else "has 12"
    with pytest.raises(ValueError, match=mend) as caught:
        rotation_test(update, basis.T if shape[0] < shape[1] else basis, side=side)
    assert axis in str(caught.value)


def test_what_is_no_update_or_no_side_is_refused():
    update, basis = tensors()
    with pytest.raises(ValueError, match=r"side must be 'read' .* or 'write' .*, got 'input'"):
        answer(update, basis, side="input")
    update[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match="dW has 2 entries that are NaN or infinite: check the two check"):
        rotation_test(update, basis, side="read")
    with pytest.raises(ValueError, match="U has 60 entries that are NaN or infinite"):
        rotation_test(torch.ones(12, 20), basis * torch.nan, side="read")
    with pytest.raises(ValueError, match="dW is all zero, so that no share of it lies anywhere"):
        rotation_test(torch.zeros(12, 20), basis, side="read")
    with pytest.raises(
        ValueError, match=r"U must be a matrix, got the shape \(20,\): a single direction u i"
    ):
        answer(torch.ones(12, 20), basis[:, 0], side="read")
    for wrong in (np.ones((12, 20), dtype=int), torch.ones(12, 20, dtype=torch.int8), [[1.0]]):
        with pytest.raises(
            TypeError, match="dW must be a tensor or NumPy array of floating-point numbers, go"
        ):
            answer(wrong, basis, side="read")
