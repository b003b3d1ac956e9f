"""Directions of the residual stream by name: those of an edit, and those that it is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.estimators.reference_subspaces import Place, place_of
from weightgeom.geometry.subspace import Subspace
from weightgeom.models.residual import INPUTS, ResidualMatrix
from weightgeom.params import Params

Control = Literal["random", "bottom", "orthogonal", "within", "layer"]
NAMES = ("activation", "prediction", "gradient", "delta", "random")


@dataclass(frozen=True, eq=False)
class Directions:
    """Unit vectors of the residual stream at one model.

    `axes` holds all principal directions of every place, strongest first: of the inputs' second moments
    and of the unembedding. The first `k` of a place span its subspace.
    """

    axes: Mapping[Place, Subspace]
    k: int
    seed: int

    def named(
        self, name: str, matrix: ResidualMatrix, gradients: Params, deltas: Params
    ) -> tuple[Float[Tensor, " d_model"], Tensor | None]:
        """A direction by name or from a file, and what goes with it on the matrix's other side, if anything.

        `activation` is the top direction of what the matrix's block reads, `prediction` that of the
        unembedding, `gradient` and `delta` one side of the top singular pair of G or of the update, with
        the other one.

        Raises:
            ValueError: if it is zero or not finite, or the file's vector does not fit.
        """
        if name in ("gradient", "delta"):
            left, right = top_pair((gradients if name == "gradient" else deltas), matrix, name)
            return (right, left) if matrix.role == "read" else (left, right)
        if name == "activation":
            return self.axes[INPUTS[matrix.block], matrix.layer].basis[:, 0], None
        if name == "prediction":
            return self.axes["prediction", None].basis[:, 0], None
        if name == "random":
            return self._haar(matrix, "treatment"), None
        return unit(from_file(Path(name), matrix), f"the direction in {name}"), None

    def control(self, kind: Control, matrix: ResidualMatrix, draw: int) -> Float[Tensor, " d_model"]:
        """The `draw`-th control of a kind, but for `layer`; those drawn are as uniform as may be."""
        basis = self.axes[place_of(matrix)].basis
        if kind == "bottom":
            return basis[:, -1 - draw]
        vector = self._haar(matrix, f"{kind} {draw}")
        if kind == "random":
            return vector
        within = basis[:, : self.k] @ (basis[:, : self.k].T @ vector)
        return unit(within if kind == "within" else vector - within, f"a direction {kind} of the subspace")

    def _haar(self, matrix: ResidualMatrix, what: str) -> Float[Tensor, " d_model"]:
        d = self.axes["prediction", None].basis.shape[0]
        return haar(d, f"{self.seed} {matrix.name} {what}")


def haar(d: int, what: str) -> Float[Tensor, " d"]:
    """A Haar-uniform unit vector that the text draws, in fp64."""
    generator = np.random.default_rng([*what.encode()])  # whose seeds may be as alike as these texts are
    return unit(torch.from_numpy(generator.standard_normal(d)), "a random direction")


def unit(vector: Float[Tensor, " d"], what: str) -> Float[Tensor, " d"]:
    """The vector over its norm, in fp64.

    Raises:
        ValueError: if it is zero or not finite.
    """
    vector = vector.double().cpu()
    norm = float(vector.norm())
    if not bool(vector.isfinite().all()) or norm == 0:
        raise ValueError(f"{what} is {'zero' if norm == 0 else 'not finite'}: it has no direction")
    return vector / norm


def signed(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """The columns with their largest entries positive, which eigenvectors and singular vectors leave open."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign()


def top_pair(params: Params, matrix: ResidualMatrix, what: str) -> tuple[Tensor, Tensor]:
    """The top singular pair (u, v) of a matrix, in fp64: the strongest edit there is to first order.

    Raises:
        ValueError: if the matrix is zero or not finite.
    """
    from scipy.sparse.linalg import svds

    values = matrix.of(params).double().cpu()
    norm = float(values.norm())
    if not bool(values.isfinite().all()) or norm == 0:
        problem = "zero" if norm == 0 else "not finite"
        raise ValueError(f"the {what} of {matrix.name} is {problem}: it has no top singular pair")
    start = np.random.default_rng(0).standard_normal(min(values.shape))
    u, _, v = svds((values / norm).numpy(), k=1, v0=start)
    assert u is not None and v is not None
    left, right = torch.from_numpy(u[:, 0].copy()), torch.from_numpy(v[0].copy())
    sign = signed(right[:, None])[:, 0] @ right
    return left * sign, right * sign


def from_file(path: Path, matrix: ResidualMatrix) -> Tensor:
    """The tensor in a `.npy` or `.safetensors` file: that under the matrix's name, or the only one.

    Raises:
        ValueError: if the file cannot be read, or holds no tensor for this matrix.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix not in (".npy", ".safetensors") or not path.is_file():
        raise ValueError(
            f"no direction {str(path)!r}: give one of {', '.join(NAMES)}, or a .npy or .safetensors file"
        )
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if matrix.name not in names and len(names) != 1:
                raise ValueError(f"it holds {names}, and none is named {matrix.name}")
            return file.get_tensor(matrix.name if matrix.name in names else names[0])
    except (ValueError, TypeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(f"the direction in {path} cannot be used: {error}") from error


def check_direction(name: str, matrix: ResidualMatrix, d_model: int) -> None:
    """Raise ValueError for a name that there is not, or a file whose vector does not fit."""
    if name in NAMES:
        return
    vector = from_file(Path(name), matrix)
    if tuple(vector.shape) != (d_model,):
        raise ValueError(
            f"the direction in {name} has shape {tuple(vector.shape)}, and the residual stream that"
            f" {matrix.name} {'reads' if matrix.role == 'read' else 'writes'} is {d_model} wide"
        )
    unit(vector, f"the direction in {name}")
