"""Subspaces of the residual stream, and the share of an update that lies in one."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Subspace:
    """A k-dimensional subspace of R^d, given by an orthonormal basis in its columns, strongest first."""

    basis: Float[Tensor, "d k"]

    @classmethod
    def top(cls, moment: Float[Tensor, "d d"], k: int) -> "Subspace":
        """Span of the k eigenvectors of a symmetric matrix with the largest eigenvalues (fp64 `eigh`).

        Raises:
            ValueError: if k is not between 1 and d, or the matrix has an entry that is not finite.
        """
        _check_k(k, moment.shape[0])
        if not bool(moment.isfinite().all()):
            raise ValueError("no subspace of a second moment with entries that are not finite")
        _, vectors = torch.linalg.eigh(moment.double())
        return cls(vectors[:, -k:].flip(1))

    @classmethod
    def random(cls, d: int, k: int, generator: torch.Generator) -> "Subspace":
        """A Haar-uniform subspace: the span of k Gaussian vectors.

        Raises:
            ValueError: if k is not between 1 and d.
        """
        _check_k(k, d)
        gaussian = torch.randn(d, k, generator=generator, dtype=torch.float64)
        return cls(torch.linalg.qr(gaussian).Q)

    def first(self, k: int) -> "Subspace":
        """The span of the first k basis vectors.

        Raises:
            ValueError: if k is not between 1 and the subspace's dimension.
        """
        _check_k(k, self.basis.shape[1])
        return Subspace(self.basis[:, :k])

    def fraction(self, x: Float[Tensor, "n d"]) -> float:
        """Share of ‖x‖²_F inside the subspace, ‖x U‖²_F / ‖x‖²_F in [0, 1]; dimensionless.

        With x = dW it is the right (read) fraction, with x = dWᵀ the left (write) fraction.
        Source: arXiv:2605.16600, the two terms of its probe, each on its own side.

        Raises:
            ValueError: if `x` is all zero, where the share is undefined.
        """
        x = x.double()
        total = x.square().sum()
        if total == 0:
            raise ValueError("the share of an all-zero matrix inside a subspace is undefined")
        return float((x @ self.basis.to(x)).square().sum() / total)

    def relative_fraction(self, x: Float[Tensor, "n d"]) -> float:
        """`fraction` over its expectation k/d under a Haar-uniform subspace; 1 is isotropic, d/k the maximum.

        Raises:
            ValueError: if `x` is all zero, where the share is undefined.
        """
        d, k = self.basis.shape
        return self.fraction(x) * d / k

    def explained(self, moment: Float[Tensor, "d d"]) -> float:
        """Explained share tr(Uᵀ C U) / tr(C) of a second moment; dimensionless, in [0, 1].

        It is the fraction expected of `dW = Σ δ aᵀ` where δ does not depend on a (the matched null).

        Raises:
            ValueError: if the moment's trace is zero.
        """
        moment = moment.double()
        total = moment.trace()
        if total == 0:
            raise ValueError("the explained share of a second moment with zero trace is undefined")
        basis = self.basis.to(moment)
        return float(torch.trace(basis.T @ moment @ basis) / total)


def _check_k(k: int, d: int) -> None:
    if not 1 <= k <= d:
        raise ValueError(f"a subspace of {d} dimensions has no {k}-dimensional part: k must be 1 to {d}")


def prediction_moment(
    unembedding: Float[Tensor, "vocabulary d"],
    gain: Float[Tensor, " d"],
    *,
    fold_gain: bool = True,
    centre: bool = True,
) -> Float[Tensor, "d d"]:
    """Gram matrix of the unembedding `W_U diag(gamma)`, rows centred over the vocabulary, in fp64.

    Its top eigenvectors are the top right singular vectors of the unembedding, without a V x d SVD.
    Both knobs are ours; `fold_gain=False, centre=False` is the raw `W_U` of the authors' notebook.
    Accumulated in slices of the vocabulary, so that no fp64 copy of W_U is held.
    """
    d = unembedding.shape[1]
    scale = gain.double() if fold_gain else torch.ones(d, dtype=torch.float64, device=unembedding.device)
    gram = torch.zeros(d, d, dtype=torch.float64, device=unembedding.device)
    total = torch.zeros(d, dtype=torch.float64, device=unembedding.device)
    for rows in unembedding.split(8192):
        scaled = rows.double() * scale
        gram += scaled.T @ scaled
        total += scaled.sum(0)
    if centre:
        gram -= torch.outer(total, total) / unembedding.shape[0]
    return gram
