"""Null distributions of the subspace fraction, against which the concentration of an update is tested."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice
from math import hypot, sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.gram import EXACT, product
from weightgeom.geometry.subspace import Subspace, eigenpairs, eigenvalues

CERTAIN = -25.0  # logarithm of a probability that no sample shows


@dataclass(frozen=True)
class Null:
    """Distribution of a fraction under chance: its mean, its standard deviation and its upper tail.

    `tail` takes several fractions at once, which then share the samples.
    """

    mean: float
    sd: float
    tail: Callable[[Sequence[float]], list[tuple[float, float | None]]]

    def z(self, fraction: float) -> float:
        """Standard deviations by which `fraction` exceeds the null's mean; 0 if the null has no spread."""
        return (fraction - self.mean) / self.sd if self.sd > 0 else 0.0

    def p_value(self, fraction: float) -> tuple[float, float | None]:
        """One-sided p-value and its error: the null's probability of a fraction at least this large.

        The error is the Monte Carlo standard error √(p (1 - p) / draws), or None where p is exact. A sampled
        p is (1 + #{draws ≥ fraction}) / (1 + draws). A null without spread has p = 1 for every fraction.
        Source: Phipson & Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9:39.
        """
        return self.p_values([fraction])[0]

    def p_values(self, fractions: Sequence[float]) -> list[tuple[float, float | None]]:
        """The `p_value` of each fraction."""
        return self.tail(fractions) if self.sd > 0 else [(1.0, None) for _ in fractions]


@dataclass(frozen=True)
class Estimated:
    """A null whose level was estimated, with a relative standard error on `df` degrees of freedom.

    The level is taken to vary as Student's t around its estimate. Source: ours.
    """

    null: Null
    error: float
    df: int

    def z(self, fraction: float) -> float:
        """As `Null.z`, with the error of the level added in square to the null's standard deviation."""
        sd = sqrt(self.null.sd**2 + (self.error * self.null.mean) ** 2)
        return (fraction - self.null.mean) / sd if sd > 0 else 0.0

    def p_value(self, fraction: float) -> tuple[float, float | None]:
        """As `Null.p_value`, the mean over 15 equally likely levels."""
        if not self.error:
            return self.null.p_value(fraction)
        from scipy.stats import t

        levels = [1 + self.error * float(t.ppf((place + 0.5) / 15, self.df)) for place in range(15)]
        p_values = self.null.p_values([fraction / max(level, 1e-3) for level in levels])
        errors = [error for _, error in p_values if error is not None]
        p = sum(value for value, _ in p_values) / len(p_values)
        return p, sum(errors) / len(errors) if errors else None


def beta_null(mean: float, sd: float) -> Null:
    """The Beta distribution with this mean and standard deviation."""

    def tail(fractions: Sequence[float]) -> list[tuple[float, float | None]]:
        from scipy import stats

        concentration = mean * (1 - mean) / sd**2 - 1
        beyond = np.asarray(fractions, dtype=np.float64)
        if concentration > 1e12:  # indistinguishable from a normal; scipy's Beta is NaN from about 1e16
            return [(float(p), None) for p in stats.norm.sf((beyond - mean) / sd)]
        p_values = stats.beta.sf(beyond, mean * concentration, (1 - mean) * concentration)
        return [(float(p), None) for p in p_values]

    return Null(mean, sd, tail)


def isotropic_null(d: int, k: int, n: int) -> Null:
    """Null of a d x n matrix of iid Gaussian entries: exactly Beta(k n / 2, (d - k) n / 2).

    `d` is the dimension of the space that contains the k-dimensional subspace, `n` the other dimension.
    Source: the squared norms inside and outside the subspace are independent chi-squares with k n and
    (d - k) n degrees of freedom.
    """
    mean = k / d
    return beta_null(mean, sqrt(mean * (1 - mean) / (d * n / 2 + 1)))


def spectrum_shares(gram: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Squared singular values of x over their sum, from its Gram matrix xᵀ x.

    Accurate to the Gram matrix's own precision: to 1e-7 of the largest in fp32.

    Raises:
        ValueError: if the Gram matrix is all zero.
    """
    if not bool(gram.any()):
        raise ValueError("an all-zero matrix has no singular directions to rotate")
    squares = torch.linalg.eigvalsh(gram).double().clamp(min=0)
    return squares / squares.sum()


def rotation_null(shares: Float[Tensor, " d"], k: int, seed: int, draws: int = 999) -> Null:
    """Null that keeps the singular values of x and rotates its right singular vectors by a Haar rotation.

    With p_i the `spectrum_shares` of xᵀ x, the fraction is Σ p_i X_i, where X_i is the squared length of the
    i-th rotated vector inside the subspace. Every X_i is Beta(k/2, (d-k)/2) with variance
    s² = 2k(d-k) / (d²(d+2)), and Σ_i X_i = k over a full basis gives cov(X_i, X_j) = -s²/(d-1), so

        mean = k/d        var = s² (d Σp² - 1) / (d - 1),

    both exact. The p-value is exact at rank one (all but 1e-5 of ‖x‖² in one direction, which allows for
    fp32) and sampled otherwise. Calls with the same d, k, seed and draws share their draws of X, so the
    Monte Carlo errors of their p-values are correlated. Source: ours.
    """
    d = len(shares)
    excess = d * float(shares.square().sum()) - 1
    single = 2 * k * (d - k) / (d**2 * (d + 2))
    sd = sqrt(single * excess / (d - 1)) if excess > 1e-12 else 0.0  # smaller values are rounding errors
    if sd == 0 or float(shares.max()) > 1 - 1e-5:
        return beta_null(k / d, sd)
    deviations = _row_norm_deviations(d, k, draws, seed) @ shares.to("cpu", torch.float32)
    sampled = k / d + deviations.double().numpy()

    def tail(fractions: Sequence[float]) -> list[tuple[float, float | None]]:
        return [_sampled_p_value(int((sampled >= fraction).sum()), draws) for fraction in fractions]

    return Null(k / d, sd, tail)


@lru_cache(maxsize=16)  # entries of 16 MiB each at d = 4096 and 999 draws
def _row_norm_deviations(d: int, k: int, draws: int, seed: int) -> Float[Tensor, "draws d"]:
    """Squared row norms of Haar-uniform d x k bases, minus their mean k/d; in fp32."""
    if 2 * k > d:  # the complement is Haar-uniform too, smaller and better conditioned
        return -_row_norm_deviations(d, d - k, draws, seed)
    generator = torch.Generator().manual_seed(seed)
    # Above d = 256, a Gaussian matrix with 2 k ≤ d is conditioned well enough for a QR in fp32 to 1e-5.
    dtype = torch.float64 if d <= EXACT else torch.float32
    deviations = torch.empty(draws, d)
    for part in deviations.split(max(1, 2**20 // (d * k))):
        gaussian = torch.randn(len(part), d, k, generator=generator, dtype=dtype)
        factor = torch.linalg.cholesky(gaussian.mT @ gaussian)
        # gaussian = basis @ factorᵀ, so the solution is basisᵀ.
        basis = torch.linalg.solve_triangular(factor, gaussian.mT, upper=False)
        norms = basis.square().sum(1).double()
        part.copy_(norms * (k / norms.sum(1, keepdim=True)) - k / d)
    return deviations


def null_ratio_sd(d: int, k: int, other: int) -> float:
    """Standard deviation of ‖Uᵀ V‖²_F d / (k l) for dimensions k and l, where one subspace is Haar-uniform.

    ‖Uᵀ V‖²_F has the mean k l / d and the variance 2 k l (d - k)(d - l) / (d² (d - 1)(d + 2)), exact; at
    k = 1 it is Beta(l/2, (d - l)/2). Source: ours, from the second moments of a uniform projector.
    """
    if d == 1:
        return 0.0
    return sqrt(2 * (d - k) * (d - other) / (k * other * (d - 1) * (d + 2)))


def rotated(update: Float[Tensor, "d_out d_in"], generator: torch.Generator) -> Float[Tensor, "d_out d_in"]:
    """A dW Bᵀ with independent Haar rotations A and B."""
    left, right = (_haar(d, generator).to(update) for d in update.shape)
    return left @ update @ right.T


def _haar(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    factors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return factors.Q * factors.R.diagonal().sign()


DIVISIONS = 5000  # of members among two groups that are tried at most


@dataclass(frozen=True)
class Relabelled:
    """Mean similarities within and between two groups, and the p-value of their difference."""

    between: float
    within: float
    within_sd: float  # over pairs
    p_value: float
    pairs_between: int
    pairs_within: int
    divisions: int  # of the members among the groups that the p-value is a share of


def relabelled(similarity: Float[Tensor, "n n"], first: int) -> Relabelled:
    """Whether members of a group, the first `first` or the rest, are more alike than those of two groups.

    The p-value is the share of all divisions into groups of these sizes whose mean within groups exceeds the
    mean between them at least as much, the observed division among them: exact where all members are
    exchangeable, and at least one over the number of divisions. Of more than 5000 divisions, the observed and
    4999 drawn ones count. `similarity` is symmetric; its diagonal does
    not count. Source: Mielke & Berry (2007), Permutation Methods, chapter 2, with similarities for distances.

    Raises:
        ValueError: if a group has fewer than two members.
    """
    n = len(similarity)
    if not 2 <= first <= n - 2:
        raise ValueError(f"each group must have two members or more, got {first} and {n - first}")
    first_member, second_member = torch.triu_indices(n, n, 1)
    values = similarity.double()[first_member, second_member]
    divisions = list(islice(combinations(range(n), first), DIVISIONS + 1))
    if len(divisions) > DIVISIONS:
        generator = np.random.default_rng(0)
        drawn = (tuple(generator.permutation(n)[:first]) for _ in range(DIVISIONS - 1))
        divisions = [divisions[0], *drawn]
    excess = []
    for members in divisions:
        group = torch.zeros(n, dtype=torch.bool)
        group[list(members)] = True
        same = group[first_member] == group[second_member]
        excess.append(float(values[same].mean() - values[~same].mean()))
    group = torch.arange(n) < first  # the first of the combinations
    same = group[first_member] == group[second_member]
    within, between = values[same], values[~same]
    p_value = sum(value >= excess[0] - 1e-12 for value in excess) / len(excess)
    sd = float(within.std())
    return Relabelled(
        float(between.mean()), float(within.mean()), sd, p_value, len(between), len(within), len(excess)
    )


def rank_p_value(treatment: Float[Tensor, ""], controls: Float[Tensor, " n"]) -> float:
    """One-sided p-value of `treatment` exceeding exchangeable `controls`.

    p = (1 + #{controls ≥ treatment}) / (1 + n), valid for every n and never 0.
    Source: Phipson & Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9:39.
    """
    return _sampled_p_value(int((controls >= treatment).sum()), len(controls))[0]


def _sampled_p_value(exceeding: int, draws: int) -> tuple[float, float | None]:
    p = (1 + exceeding) / (1 + draws)
    return p, sqrt(p * (1 - p) / draws)


def moment_eigen(
    moment: Float[Tensor, "d d"],
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues of a second moment, ascending, and its eigenvectors in the columns, in fp64.

    Eigenvalues that rounding made negative are set to zero.

    Raises:
        ValueError: if the moment's trace is not positive.
    """
    if not float(moment.trace()) > 0:
        raise ValueError(
            f"the trace of a second moment must be positive, got {float(moment.trace())}: at 0 every vector"
            " behind it is zero, as after an embedding or a norm of zeros; check the checkpoint's weights"
        )
    values, vectors = eigenpairs(moment)
    return values.clamp(min=0), vectors


def moment_root(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Root R of a second moment C = R Rᵀ, with orthogonal columns (eigenvectors times √eigenvalue), in fp64.

    Raises:
        ValueError: if the moment's trace is not positive.
    """
    values, vectors = moment_eigen(moment)
    return vectors * values.sqrt()


def matched_null(
    gram: Float[Tensor, "d d"],
    root: Float[Tensor, "d d"],
    space: Subspace,
    seed: int,
    draws: int = 999,
) -> Null:
    """Null of a matrix x whose rows are random mixtures of vectors with second moment C.

    C = R Rᵀ with R its `moment_root`; `gram` is xᵀ x. The model is x = L Z C^{1/2}, with Z iid Gaussian and
    L fixed but unknown: activation-matched on the read side, gradient-matched on the write side.
    With A = C^{1/2} U Uᵀ C^{1/2} and ψ the `left_concentration` of x (one over the effective number of rows),

        mean = tr(A)/tr(C) = m        var = 2 ψ tr((A - m C)²) / tr(C)²

    to first order in ψ: with few effective rows and one direction that dominates C, z can be several times
    too large, so judge by p. The p-value of a fraction f is P(Σ μ_j q_j ≥ 0), sampled, with μ the
    eigenvalues of A - f C and q_j iid Gamma(1/(2ψ)). It is exact if LᵀL is a multiple of a projector and ψ
    is known, and Satterthwaite's approximation otherwise. Where Chernoff's bound on that probability, or on
    its complement, is below 1e-10, nothing is sampled, as no draw would differ. ψ is estimated from pairs of
    directions: if at most five directions of C have weight, the p-values are slightly too small (7 % of them
    below 0.05). Source: ours.

    Raises:
        ValueError: if the Gram matrix or the root is all zero.
    """
    psi = left_concentration(gram, root)
    values = root.double().square().sum(0)
    inside = space.basis.T.to(values) @ root.double()
    numerator = inside.T @ inside  # A in the eigenbasis of C, where C is diagonal
    del inside
    diagonal = numerator.diag().clone()
    mean = float(diagonal.sum() / values.sum())
    off_diagonal = float(numerator.fill_diagonal_(0).norm())
    spread = hypot(off_diagonal, float((diagonal - mean * values).norm())) / float(values.sum())
    sd = sqrt(2 * psi) * spread if spread > 1e-12 else 0.0  # smaller values are rounding errors
    # Read side: the columns of U are eigenvectors of C, so A and C commute.
    commuting = off_diagonal < 1e-7 * float(values.sum())  # the root may be fp32
    if commuting:
        numerator = diagonal.new_zeros(0, 0)
    else:
        numerator.diagonal().copy_(diagonal)

    def tail(fractions: Sequence[float]) -> list[tuple[float, float | None]]:
        asked = torch.tensor(fractions, dtype=values.dtype, device=values.device)
        low, high = min(fractions), max(fractions)
        nearest = low if low > mean else high
        if low > mean or high < mean:
            form = diagonal - nearest * values if commuting else numerator - nearest * values.diag()
            if _log_bound(form, 0.5 / psi) < CERTAIN:
                return [_sampled_p_value(0 if low > mean else draws, draws)] * len(fractions)
        if commuting:
            mu = diagonal[:, None] - values[:, None] * asked
        else:
            mu = _spectra(numerator, values, asked)
        q = np.random.default_rng(seed).standard_gamma(0.5 / psi, (draws, len(mu)))
        exceeding = (q @ mu.cpu().numpy() >= 0).sum(0)
        return [_sampled_p_value(int(count), draws) for count in exceeding]

    return Null(mean, sd, tail)


def _log_bound(form: Float[Tensor, " d"] | Float[Tensor, "d d"], shape: float) -> float:
    """Logarithm of a bound on P(Σ μ_j q_j has the other sign than its mean), q_j iid Gamma(shape).

    μ are the eigenvalues of the symmetric `form`, or `form` itself. Chernoff: det(I - s form)^(-shape), at
    the s that would be best if the sum were normal, or smaller ones where the determinant needs it.
    """
    diagonal = form.dim() == 1
    trace = form.sum() if diagonal else form.trace()
    s = -float(trace / form.square().sum())
    for part in (s, s / 4, s / 16):
        if diagonal:
            tilted = 1 - part * form
            if bool((tilted > 0).all()):
                return -shape * float(tilted.log().sum())
        else:
            tilted = torch.eye(len(form), dtype=form.dtype, device=form.device) - part * form
            factor, failed = torch.linalg.cholesky_ex(tilted)
            if not int(failed):
                return -2 * shape * float(factor.diag().log().sum())
    return 0.0


def _spectra(
    a: Float[Tensor, "d d"], c: Float[Tensor, " d"], fractions: Float[Tensor, " n"]
) -> Float[Tensor, "d n"]:
    """Eigenvalues of A - f diag(c), ascending, for each of the fractions f.

    Of more than three, those of the lowest, the middle and the highest f are computed and the others
    interpolated by a parabola: they are smooth in f, but for avoided crossings, and the levels of `Estimated`
    are close together. Source: ours.
    """
    low, high = float(fractions.min()), float(fractions.max())
    nodes = (
        fractions
        if len(fractions) <= 3 or low == high
        else fractions.new_tensor([low, (low + high) / 2, high])
    )
    spectra = torch.stack([eigenvalues(a - f * c.diag()).flip(0) for f in nodes], 1).to(a)
    if len(nodes) == len(fractions):
        return spectra
    x = (fractions - low) / (high - low)
    weights = torch.stack([(1 - x) * (1 - 2 * x), 4 * x * (1 - x), x * (2 * x - 1)])
    return spectra @ weights


def adapter_moment(a: Float[Tensor, "r d"], moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Q C Q with Q = Aᵀ A: the second moment of the rows of a LoRA update while A is near its start.

    With B = 0 at first, B becomes a sum of -δ_t (A a_t)ᵀ, so that B A = -G Q with G the plain update, a sum
    of δ_t a_tᵀ. If δ_t is independent of a_t, the share of B A inside U is tr(Uᵀ Q C Q U) / tr(Q C Q) in
    expectation: that of `matched_null` for this moment. Source: ours, after arXiv:2106.09685, eq. 3.
    """
    a = a.to(moment)
    return a.T @ ((a @ moment @ a.T) @ a)


def left_concentration(gram: Float[Tensor, "d d"], root: Float[Tensor, "d d"]) -> float:
    """ψ = tr(S²)/tr(S)² of S = LᵀL in the model x = L Z C^{1/2}, estimated from xᵀ x; in (0, 1].

    1/ψ is the effective number of independent rows. In the eigenbasis of C, with g = xᵀ x,
    E g_ij² = λ_i λ_j tr(S²) and E g_ii g_jj = λ_i λ_j tr(S)² for i ≠ j, so

        ψ = Σ_{i≠j} w_i w_j g_ij² / Σ_{i≠j} w_i w_j g_ii g_jj

    for any weights; ψ is 1 at rank one. With many rows, an estimate from the moments of the whole Gram
    matrix would subtract two large numbers. w_i = λ_i / (λ_i + λ)², with √λ the mean of √λ_i (which an
    outlier hardly moves): larger directions get nearly equal weight, which keeps the variance low, and
    directions with almost no share of x get almost none. Source: ours.

    Raises:
        ValueError: if the Gram matrix or the root is all zero.
    """
    if not bool(gram.any()) or not bool(root.any()):
        raise ValueError("an all-zero matrix has no rows to compare with a second moment")
    values = root.double().square().sum(0)
    weights = 1 / (values + values.sqrt().mean() ** 2)
    if len(root) > EXACT:  # in fp32: the sums of squares below are to six digits
        scaled = (root.float() * weights.float()).contiguous()
        gram = product(product(scaled.T.contiguous(), gram.to(scaled)), scaled.T)
    else:
        scaled = root.double() * weights
        gram = scaled.T @ gram.to(scaled) @ scaled
    diagonal = gram.diag().double()
    gram.fill_diagonal_(0)
    off_diagonal = sum(float(rows.double().square().sum()) for rows in gram.split(EXACT))
    pairs = float(diagonal.sum() ** 2 - diagonal.square().sum())
    if pairs <= 1e-12 * float(diagonal.sum() ** 2):  # a single direction does not determine ψ
        return 1.0
    return min(1.0, off_diagonal / pairs)
