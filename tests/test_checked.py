"""The checks of types and shapes under which the tests run, of tests/helpers/checked.py."""

import pytest
import torch
from checked import CALLS, first_calls
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from weightgeom.geometry.subspace import iterative_is_faster


def test_the_package_is_checked() -> None:
    assert hasattr(iterative_is_faster, "__wrapped__")  # by jaxtyping


def test_shapes_are_checked_in_the_first_calls_and_no_more() -> None:
    @jaxtyped(typechecker=first_calls)
    def product(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> int:
        return len(left)

    right = torch.zeros(3, 2)
    with pytest.raises(TypeCheckError):
        product(torch.zeros(2, 2), right)
    for _ in range(CALLS):
        assert product(torch.zeros(2, 3), right) == 2
    assert product(torch.zeros(2, 2), right) == 2
