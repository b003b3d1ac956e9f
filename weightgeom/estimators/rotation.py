"""The rotation test of one update against one subspace, for matrices in memory."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.estimators.updates import update_of, zeros
from weightgeom.geometry.nulls import rotation_null, spectrum_shares
from weightgeom.geometry.subspace import Subspace
from weightgeom.models.residual import ResidualMatrix

ORTHONORMAL = 1e-4  # the largest entry of UᵀU - I in a basis: above the rounding of fp32, below that of bf16


@dataclass(frozen=True)
class RotationTest:
    """An update's fraction inside a subspace, and its null under a random rotation; all of unit 1.

    `fraction` is in [0, 1], and `ratio` is fraction / (k/d), in [0, d/k]; `null_mean` = k/d and `null_sd`
    are those of the fraction, `z` = (fraction - null_mean) / null_sd, and `p_value` is one-sided: is the
    update more concentrated than chance?
    """

    fraction: float
    ratio: float
    null_mean: float
    null_sd: float
    z: float
    p_value: float


def rotation_test(
    dW: Float[Tensor, "d_out d_in"] | Float[np.ndarray, "d_out d_in"],
    U: Subspace | Float[Tensor, "d k"] | Float[np.ndarray, "d k"],
    *,
    side: Literal["read", "write"],
    orthonormalise: bool = False,
    seed: int = 0,
) -> RotationTest:
    """Test whether an update dW, of y = W a, lies in the span of U more than chance would have it.

    The fraction is ‖dW U‖²_F / ‖dW‖²_F on the input side (`read`, d = d_in), ‖Uᵀ dW‖²_F / ‖dW‖²_F on the
    output side (`write`, d = d_out). Under the null, dW keeps its singular values and its singular vectors
    on that side are rotated at random (`weightgeom.geometry.nulls.rotation_null`): mean and sd are exact,
    p is sampled with 999 draws, hence 0.001 at the least, and exact at rank one. With the same subspace and
    seed these are the numbers of the probe `rsf`, whose table has null_ratio_mean and null_ratio_sd:
    null_mean and null_sd times d/k. Source: the fraction, arXiv:2605.16600, one side at a time; the null is
    ours.

    `orthonormalise` takes the span of U's columns where they are no orthonormal basis. The arrays may
    require a gradient and lie on any device; they are not changed.

    Examples:
        >>> test = rotation_test(after - before, spaces["attention_input", 3], side="read")
        >>> print(f"{test.ratio:.1f} times chance, p = {test.p_value:.3f}")

    Raises:
        TypeError: if dW or U is no tensor or array of floating-point numbers.
        ValueError: if side is neither read nor write, dW is zero or not finite, U does not have the
            dimension of that side, or its columns are not orthonormal (linearly dependent, with
            `orthonormalise`).
    """
    if side not in ("read", "write"):
        raise ValueError(
            f"side must be 'read' (U in the inputs of dW) or 'write' (U in its outputs), got {side!r}"
        )
    update = _matrix(dW, "dW")
    if not bool(update.any()):
        raise ValueError("dW is all zero, so that no share of it lies anywhere: this matrix has not moved")
    basis = _matrix(U.basis if isinstance(U, Subspace) else U, "U")
    _check_side(update, basis, side)
    space = Subspace(_orthonormal(basis.double(), orthonormalise))
    d, k = space.basis.shape
    matrix = ResidualMatrix(0, "q" if side == "read" else "o", "dW")
    weights = {matrix.parameter: update}
    gram = update_of(matrix, weights, zeros(matrix, weights)).gram
    null = rotation_null(spectrum_shares(gram), k, seed)
    fraction = float(space.shares(gram).cumsum(0)[-1])
    p_value, _ = null.p_value(fraction)
    return RotationTest(fraction, fraction * (d / k), null.mean, null.sd, null.z(fraction), p_value)


def _matrix(array: Any, name: str) -> Float[Tensor, "rows columns"]:
    """A matrix on the CPU and without its graph."""
    if isinstance(array, np.ndarray) and array.dtype.kind == "f":
        array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if not isinstance(array, Tensor) or not array.is_floating_point():
        kind = array.dtype if isinstance(array, (Tensor, np.ndarray)) else type(array).__name__
        raise TypeError(
            f"{name} must be a tensor or NumPy array of floating-point numbers, got {kind}: convert it with"
            " torch.as_tensor(..., dtype=torch.float32)"
        )
    if array.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix, got the shape {tuple(array.shape)}: a single direction u is the matrix"
            " u[:, None]"
        )
    if bad := int((~array.isfinite()).sum()):
        raise ValueError(
            f"{name} has {bad} entries that are NaN or infinite: check the two checkpoints that it comes from"
        )
    return array.detach().cpu()


def _check_side(
    update: Float[Tensor, "d_out d_in"], basis: Float[Tensor, "d k"], side: Literal["read", "write"]
) -> None:
    d_out, d_in = update.shape
    d, axis = (d_in, "input") if side == "read" else (d_out, "output")
    if len(basis) == d:
        return
    if basis.shape[1] == d:
        mend = "give U.T, with a direction in each column"
    elif len(basis) == (d_out if side == "read" else d_in):
        mend = f"take side={'write' if side == 'read' else 'read'!r}"
    else:
        mend = f"give a basis of {d} rows"
    raise ValueError(
        f"U is of shape {tuple(basis.shape)}, and the {axis} side of dW, of shape {(d_out, d_in)}, has {d}"
        f" dimensions: {mend}"
    )


def _orthonormal(basis: Float[Tensor, "d k"], orthonormalise: bool) -> Float[Tensor, "d k"]:
    d, k = basis.shape
    error = float((basis.T @ basis - torch.eye(k).to(basis)).abs().max()) if k else 0.0
    if 0 < k <= d and error <= ORTHONORMAL:
        return basis
    if not orthonormalise:
        raise ValueError(
            f"the columns of U are not orthonormal (UᵀU differs from the identity by {error:.2g}), so that a"
            " fraction could exceed 1: add orthonormalise=True to take their span"
        )
    rank = int(torch.linalg.matrix_rank(basis)) if k else 0
    if rank < max(k, 1):
        raise ValueError(f"the {k} columns of U span {rank} dimensions: give linearly independent ones")
    return torch.linalg.qr(basis).Q
