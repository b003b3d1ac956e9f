"""Edits of weights, as values: the weights that they are applied to are never mutated."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.models.residual import ResidualMatrix
from weightgeom.params import Params

Space = Callable[[ResidualMatrix], Float[Tensor, "d k"]]
"""A subspace for each of some matrices, drawn or looked up when it is asked for."""


@runtime_checkable
class Edit(Protocol):
    """Something that may be done to weights."""

    def applied(self, params: Params) -> Params:
        """The edited weights; unedited parameters are shared, and nothing is mutated."""
        ...


@dataclass(frozen=True, eq=False)
class RankOne:
    """W' = W + α u vᵀ for one matrix, u and v unit vectors; α in the units of the weights.

    Source: the closed-form rank-1 intervention of arXiv:2605.16600.

    Raises:
        ValueError: if u or v is not a unit vector.
    """

    matrix: ResidualMatrix
    alpha: float
    u: Float[Tensor, " d_out"]
    v: Float[Tensor, " d_in"]

    def __post_init__(self) -> None:
        """Refuse directions that are not of unit length, with which α would mean something else."""
        for name, vector in (("u", self.u), ("v", self.v)):
            if not abs(float(vector.double().norm()) - 1) < 1e-6:
                raise ValueError(
                    f"{name} of {self.matrix.name} must have norm 1, got {float(vector.norm()):g}"
                )

    def applied(self, params: Params) -> Params:
        """The edited weights, in the stored dtype."""
        weight = self.matrix.of(params)
        change = self.alpha * torch.outer(self.u.double(), self.v.double())
        return self.matrix.replaced(params, weight + change.to(weight))

    def first_order(self, gradients: Params) -> float:
        """α uᵀ G v, the change of a behaviour to first order, from the gradient of its parameter as stored.

        Source: the closed form of the same paper, with G = E[dL/dy aᵀ].
        """
        gradient = self.matrix.of(gradients).double()
        return self.alpha * float(self.u.to(gradient) @ gradient @ self.v.to(gradient))


@dataclass(frozen=True, eq=False)
class Surgery:
    """Scales an update inside and outside a subspace: W' = W₀ + i dW P + o dW (1 - P), by matrix.

    `space` gives for a matrix B with P = B Bᵀ on the residual stream's side: dW P where it reads, P dW
    where it writes. Columns of B are orthogonal and at most of unit length: a shorter one stands for a
    direction that is scaled in part. The residual side of a matrix behind which a norm follows is that of
    what reaches the stream, P diag(g) dW with its gain g.
    """

    before: Params
    matrices: Sequence[ResidualMatrix]
    space: Space
    inside: float
    outside: float

    def applied(self, params: Params) -> Params:
        """The edited weights, in fp64 until they are stored; `params` are those behind the update."""
        for matrix in self.matrices:
            start = matrix.of(self.before).double()
            delta = matrix.of(params).double() - start
            part = inside(matrix, delta, self.space(matrix), params)
            params = matrix.replaced(params, start + self.inside * part + self.outside * (delta - part))
        return params


@dataclass(frozen=True, eq=False)
class Transplant:
    """Gives some matrices the update that leads to other weights: W' = W + dW, or dW turned.

    `rotation` gives for a matrix an orthogonal R for the residual stream's side: W + dW Rᵀ where it reads,
    W + R dW where it writes, before any norm that follows, so that dW keeps its singular values. With
    `others`, all other parameters are the other weights'.
    """

    after: Params
    matrices: Sequence[ResidualMatrix]
    rotation: Callable[[ResidualMatrix], Float[Tensor, "d d"]] | None = None
    others: bool = False

    def applied(self, params: Params) -> Params:
        """The edited weights, in fp64 until they are stored."""
        edited = (
            {name: self.after[name].to(weight) for name, weight in params.items()} if self.others else params
        )
        for matrix in self.matrices:
            weight = matrix.of(params).double()
            delta = matrix.of(self.after).to(weight) - weight
            if self.rotation is not None:
                turn = self.rotation(matrix).to(delta)
                delta = delta @ turn.T if matrix.role == "read" else turn @ delta
            edited = matrix.replaced(edited, weight + delta)
        return edited


@dataclass(frozen=True, eq=False)
class TransplantRest:
    """Gives all parameters but `kept` the update that leads to other weights: W' = W + dW, or dW turned.

    With `kept` those of the residual matrices, what moves is the rest: embeddings, norms, biases and the
    like. `turn` gives for a parameter's name and dW another of the same Frobenius norm.
    """

    after: Params
    kept: Collection[str]
    turn: Callable[[str, Float[Tensor, "..."]], Float[Tensor, "..."]] | None = None

    def applied(self, params: Params) -> Params:
        """The edited weights, in fp64 until they are stored."""
        return {
            name: weight if name in self.kept else self._edited(name, weight)
            for name, weight in params.items()
        }

    def _edited(self, name: str, weight: Tensor) -> Tensor:
        if self.turn is None:
            return self.after[name].to(weight)
        exact = weight.double()
        return (exact + self.turn(name, self.after[name].to(exact) - exact)).to(weight)


def inside(
    matrix: ResidualMatrix,
    delta: Float[Tensor, "d_out d_in"],
    space: Float[Tensor, "d k"],
    params: Params,
) -> Float[Tensor, "d_out d_in"]:
    """The part of an update inside a subspace on the residual stream's side, dW B Bᵀ or B Bᵀ dW.

    Where a norm follows the matrix, B is a subspace of what reaches the stream: diag(1/g) B Bᵀ diag(g) dW.

    Raises:
        ValueError: if a gain is zero, through which nothing reaches the stream.
    """
    basis = space.to(delta)
    if matrix.role == "read":
        return (delta @ basis) @ basis.T
    gain = matrix.gain(params)
    if gain is None:
        return basis @ (basis.T @ delta)
    gain = gain.to(delta)
    if not bool(gain.all()):
        raise ValueError(f"the norm behind {matrix.name} has a gain of zero: no subspace of its output there")
    return (basis @ (basis.T @ (gain[:, None] * delta))) / gain[:, None]


def residual_side(
    matrix: ResidualMatrix, delta: Float[Tensor, "d_out d_in"], params: Params
) -> Float[Tensor, "n d"]:
    """An update with the residual stream along its rows, in fp64: dW, (dW)ᵀ or (diag(g) dW)ᵀ."""
    delta = delta.double()
    if matrix.role == "read":
        return delta
    gain = matrix.gain(params)
    return (delta if gain is None else gain.to(delta)[:, None] * delta).T


def change_norm(edit: Edit, params: Params, matrices: Iterable[ResidualMatrix]) -> float:
    """‖W' - W‖_F of an edit over these matrices, as applied: in the units of the weights, in fp64."""
    edited = edit.applied(params)
    squares = [
        (matrix.of(edited).double() - matrix.of(params).double()).square().sum() for matrix in matrices
    ]
    return float(torch.stack(squares).sum().sqrt())
