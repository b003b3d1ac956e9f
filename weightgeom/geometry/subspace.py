"""Subspaces of the residual stream, and the share of an update inside a subspace."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.gram import EXACT, add_gram, mirror


@dataclass(frozen=True, eq=False)
class Subspace:
    """A k-dimensional subspace of R^d: the columns of an orthonormal basis, strongest direction first."""

    basis: Float[Tensor, "d k"]

    @classmethod
    def top(
        cls,
        moment: Float[Tensor, "d d"],
        k: int,
        *,
        solver: Literal["auto", "full", "iterative"] = "auto",
    ) -> "Subspace":
        """Span of the k eigenvectors of a symmetric matrix with the largest eigenvalues, in fp64.

        `full` is `eigh`. `iterative` is Lanczos with restarts (ARPACK), to residuals ‖C u - λ u‖ below
        1e-7 λ, which puts the projector within 1e-7 λ_k / (λ_k - λ_{k+1}) of the exact one; if it does not
        converge or misses a direction, `full` is used instead. `auto` chooses `iterative` for d ≥ 1024 and
        k ≤ d/16, where it is many times faster (`benchmarks/top_subspace.py`). Only the lower triangle is
        read.

        Raises:
            ValueError: if k is not between 1 and d, or the matrix has an entry that is not finite.
        """
        d = moment.shape[0]
        _check_k(k, d)
        if not bool(moment.isfinite().all()):
            raise ValueError("a second moment with entries that are not finite has no top subspace")
        iterative = solver == "iterative" or (solver == "auto" and iterative_is_faster(d, k))
        basis = _lanczos(moment, k) if iterative else None
        if basis is None:
            _, vectors = eigenpairs(moment, k)
            basis = vectors.flip(1)
        return cls(basis)

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

        x = dW gives the right (read) fraction, x = dWᵀ the left (write) fraction.
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
        """`fraction` over its expectation k/d for a Haar-uniform subspace; 1 is isotropic, d/k the maximum.

        Raises:
            ValueError: if `x` is all zero, where the share is undefined.
        """
        d, k = self.basis.shape
        return self.fraction(x) * d / k

    def shares(self, moment: Float[Tensor, "d d"]) -> Float[Tensor, " k"]:
        """Shares u_iᵀ C u_i / tr(C) of a second moment or Gram matrix along each basis vector; in fp64.

        Their cumulative sum at k is the explained share of `first(k)`.

        Raises:
            ValueError: if the trace is zero.
        """
        moment = moment.double()
        total = moment.trace()
        if total == 0:
            raise ValueError("the explained share of a second moment with zero trace is undefined")
        basis = self.basis.to(moment)
        return (basis * (moment @ basis)).sum(0) / total

    def explained(self, moment: Float[Tensor, "d d"]) -> float:
        """Explained share tr(Uᵀ C U) / tr(C) of a second moment; dimensionless, in [0, 1].

        It is the expected fraction of `dW = Σ δ aᵀ` if δ is independent of a (the matched null).

        Raises:
            ValueError: if the moment's trace is zero.
        """
        return float(self.shares(moment).sum())


def eigenpairs(
    moment: Float[Tensor, "d d"], k: int | None = None
) -> tuple[Float[Tensor, " k"], Float[Tensor, "d k"]]:
    """The k largest eigenvalues of a symmetric matrix, or all, ascending, and their vectors, in fp64.

    Only the lower triangle is read. On a CPU by LAPACK's relatively robust representations (`syevr`): from
    d = 1024 on, as its workspace is small, and from d = 256 on where a quarter of the vectors or fewer are
    asked for, which takes it half the time. Else by divide and conquer, which needs a workspace of 2 d².
    """
    d = len(moment)
    few = k is not None and 4 * k <= d and d >= EXACT
    if (d < 1024 and not few) or moment.device.type != "cpu":
        values, vectors = torch.linalg.eigh(moment.double())
        return (values, vectors) if k is None else (values[-k:], vectors[:, -k:])
    from scipy.linalg import eigh

    stored = np.array(moment.detach().numpy(), dtype=np.float64, order="F")  # a copy, which is overwritten
    part = None if k is None else (d - k, d - 1)
    values, vectors = eigh(stored, subset_by_index=part, driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def eigenvalues(moment: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """The eigenvalues of a symmetric matrix, descending, in fp64, by SciPy, which is faster on a CPU."""
    from scipy.linalg import eigvalsh

    values = eigvalsh(moment.detach().cpu().double().numpy(), check_finite=False)
    return torch.from_numpy(np.ascontiguousarray(values[::-1]))


def leading_eigenpairs(
    moment: Float[Tensor, "d d"], k: int
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d k"]]:
    """All eigenvalues of a symmetric matrix, descending, and the vectors of the k largest, in fp64.

    One reduction to a tridiagonal matrix serves both (LAPACK's `sytrd`, `sterf`, `stemr` and `ormqr`), which
    takes two thirds of the time of all vectors. Only the lower triangle is read.
    """
    from scipy.linalg import eigh_tridiagonal, lapack

    d = len(moment)
    if d < 3:
        values, vectors = eigenpairs(moment)
        return values.flip(0), vectors.flip(1)[:, :k]
    stored = np.array(moment.detach().cpu().numpy(), dtype=np.float64, order="F")
    routines = cast(Any, lapack)  # SciPy has no types for these functions
    size = int(routines.dsytrd_lwork(d, lower=1)[0])
    reflectors, diagonal, beside, scales, _ = routines.dsytrd(stored, lower=1, lwork=size, overwrite_a=1)
    values, failed = routines.dsterf(diagonal, beside)
    assert not failed
    part = (d - k, d - 1)
    _, top = cast(Any, eigh_tridiagonal(diagonal, beside, select="i", select_range=part, check_finite=False))
    below, turned = np.asfortranarray(reflectors[1:, :-1]), np.asfortranarray(top[1:])
    size = int(routines.dormqr("L", "N", below, scales, turned, -1)[1][0])
    top[1:] = routines.dormqr("L", "N", below, scales, turned, size)[0]
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(top[:, ::-1].copy())


def _check_k(k: int, d: int) -> None:
    if not 1 <= k <= d:
        raise ValueError(f"k must be between 1 and {d}, the number of dimensions, got {k}")


def iterative_is_faster(d: int, k: int) -> bool:
    """Whether `Subspace.top` with solver="auto" iterates."""
    return d >= 1024 and 16 * k <= d


def _lanczos(moment: Float[Tensor, "d d"], k: int) -> Float[Tensor, "d k"] | None:
    """Top k eigenvectors by ARPACK, strongest first; None if it does not converge or has missed a direction.

    A Krylov space grown from one vector contains one direction of every eigenspace; only rounding adds the
    others. The check: after projecting out the k vectors, no eigenvalue may exceed the k-th.
    """
    from scipy.linalg import get_blas_funcs
    from scipy.sparse import linalg as sparse

    d = moment.shape[0]
    scale = max(abs(float(extreme)) for extreme in moment.aminmax())
    if k == d or scale == 0:
        return None
    # At most one fp64 copy. symv would copy an array in C order at every call; it reads one triangle, which
    # halves the memory traffic that bounds its speed.
    stored = np.asfortranarray(moment.detach().double().cpu().numpy().T)
    # SciPy has no types for these functions.
    symv = cast(Any, get_blas_funcs("symv", (stored,)))
    eigsh, operator = cast(Any, sparse.eigsh), cast(Any, sparse.LinearOperator)

    def product(x: np.ndarray) -> np.ndarray:
        # Scaled, because ARPACK's tolerance is absolute for eigenvalues below 4e-11.
        return symv(1 / scale, stored, x)

    def remainder(x: np.ndarray) -> np.ndarray:
        y = product(x - vectors @ (vectors.T @ x))
        return y - vectors @ (vectors.T @ y)

    # The check needs its own start: the first start contains only the direction of each eigenspace that the
    # iteration has already returned.
    start, other = np.random.default_rng(0).standard_normal((2, d))
    size = min(d, 2 * k + 20)  # dimension of the Krylov space
    restarts = max(2, d // (size - k))  # about d products, which take no longer than `eigh`
    try:
        whole = operator((d, d), matvec=product, dtype=np.float64)
        values, vectors = eigsh(whole, k, which="LA", v0=start, ncv=size, maxiter=restarts, tol=1e-7)
        rest = operator((d, d), matvec=remainder, dtype=np.float64)
        missed = eigsh(rest, 1, which="LA", v0=other, tol=1e-2, return_eigenvectors=False)
    except sparse.ArpackNoConvergence:
        return None
    if missed[0] > values.min() + 1e-6 * values.max():
        return None
    return torch.from_numpy(vectors[:, np.argsort(-values)]).to(moment.device)


def prediction_moment(
    unembedding: Float[Tensor, "vocabulary d"],
    gain: Float[Tensor, " d"],
    *,
    fold_gain: bool = True,
    centre: bool = True,
) -> Float[Tensor, "d d"]:
    """Gram matrix of the unembedding `W_U diag(gamma)`, rows centred over the vocabulary, in fp64.

    Its top eigenvectors are the top right singular vectors of the unembedding, without a V x d SVD.
    Both options are ours; `fold_gain=False, centre=False` is the raw `W_U` of the authors' notebook.
    Products of 2048 rows at a time in fp32 (fp64 if W_U is), summed in fp64, so that W_U is never copied.
    """
    d = unembedding.shape[1]
    dtype = torch.promote_types(unembedding.dtype, torch.float32)
    scale = gain.to(dtype) if fold_gain else torch.ones(d, dtype=dtype, device=unembedding.device)
    gram = torch.zeros(d, d, dtype=torch.float64, device=unembedding.device)
    slices = unembedding.split(2048)
    mean = torch.zeros(d, dtype=torch.float64, device=unembedding.device)
    if centre:  # before summing: subtracting a large mean from the sums would cancel their digits
        mean += sum(rows.sum(0, dtype=torch.float64) for rows in slices) / len(unembedding)
    for rows in slices:
        add_gram(gram, ((rows.to(dtype) - mean.to(dtype)) * scale).T)
    mirror(gram)
    return gram
