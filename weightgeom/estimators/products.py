"""Updates of the products of two matrices within one head: W_Qᵀ W_K, of attention scores, and W_O W_V."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.estimators.reference_subspaces import Frame, Place, place_of
from weightgeom.geometry.nulls import rotation_null
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import Adapted
from weightgeom.models.residual import Architecture, Kind, ResidualMatrix
from weightgeom.params import Params
from weightgeom.table import Row, row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sides:
    """The two sides of a product M = A B of one head, d x d, with their names in quantities."""

    name: str
    left: Kind
    right: Kind
    left_side: str
    right_side: str


PRODUCTS = (Sides("qk", "q", "k", "query", "key"), Sides("ov", "o", "v", "write", "read"))


@dataclass(frozen=True, eq=False)
class ProductUpdate:
    """The update dM = P C Rᵀ of a d x d product, with orthonormal P and R of at most 2 d_head columns; fp64.

    Nothing of d x d is formed: with A and B those of the product, dM = dA B₁ + A₀ dB = [dA, A₀] [B₁; dB],
    in which no two large numbers are subtracted, and P, R and the small core C come from the QR
    decompositions of the two factors.
    """

    left: Float[Tensor, "d r_left"]
    core: Float[Tensor, "r_left r_right"]
    right: Float[Tensor, "d r_right"]

    @classmethod
    def of(cls, left: Float[Tensor, "d r"], right: Float[Tensor, "d r"]) -> "ProductUpdate":
        """The update dM = left rightᵀ, from its two factors."""
        (p, upper), (r, other) = torch.linalg.qr(left), torch.linalg.qr(right)
        return cls(p, upper @ other.T, r)

    @property
    def norm(self) -> float:
        """‖dM‖_F, in the squared units of the weights."""
        return float(self.core.norm())

    @property
    def spectrum(self) -> Float[Tensor, " d"]:
        """The squared singular values of dM over their sum, as `spectrum_shares` has them."""
        squares = torch.linalg.svdvals(self.core).square()
        whole = squares.new_zeros(len(self.left))
        whole[: len(squares)] = squares / squares.sum()
        return whole

    def left_shares(self, space: Subspace) -> Float[Tensor, " k"]:
        """‖u_iᵀ dM‖² / ‖dM‖² along each basis vector of a subspace."""
        return self._over((space.basis.T.to(self.left) @ self.left) @ self.core)

    def right_shares(self, space: Subspace) -> Float[Tensor, " k"]:
        """‖dM u_i‖² / ‖dM‖² along each basis vector of a subspace."""
        return self._over((space.basis.T.to(self.right) @ self.right) @ self.core.T)

    def _over(self, inside: Float[Tensor, "k r"]) -> Float[Tensor, " k"]:
        return inside.square().sum(1) / self.core.square().sum()


def check_products(architecture: Architecture) -> None:
    """Refuse an architecture without a head that has all of q and k, or o and v; log layers without.

    Raises:
        ValueError: if no layer has one.
    """
    having = {layer for layer in range(architecture.n_layers) if any(_pairs(architecture, layer))}
    if not having:
        raise ValueError(
            "probe.rsf.products is about heads of q, k, v and o, and this model has none, as its attention"
            " is by latents or linear: add probe.rsf.products=false"
        )
    if missing := sorted(set(range(architecture.n_layers)) - having):
        layers = ", ".join(map(str, missing))
        log.info("no products of q and k, or o and v, in layers %s, which have no such heads", layers)


def product_places(architecture: Architecture) -> set[Place]:
    """The places whose frames `product_rows` takes."""
    kinds = {kind for product in PRODUCTS for kind in (product.left, product.right)}
    return {place_of(matrix) for matrix in architecture.matrices if matrix.kind in kinds}


def product_rows(
    setting: Setting,
    params: Params,
    frames: Mapping[Place, Frame],
    dimensions: Sequence[int],
    *,
    written: bool,
) -> Iterator[Row]:
    """The update of every head's products since the start, on both of their sides in the residual stream.

    qk: M = W_Qᵀ W_K, the bilinear form x_tᵀ M x_s of the score of token t for token s, without the positions:
    a rotary embedding, which stands between W_Q and W_K, and biases and norms of queries and keys are left
    out, so that M is the form of two tokens at one place up to these. Both of its sides read. ov: M = W_O
    W_V, the map from an attended token to the head's write; its left side writes, its right side reads. A
    gate of the output is left out. Query heads that share a key-value head each have their product with it.

    With dM = M_after - M_before, U the top-k directions of the left side's place and V those of the right
    side's: {left}_fraction = ‖Uᵀ dM‖² / ‖dM‖², {right}_fraction = ‖dM V‖² / ‖dM‖², in [0, 1], and
    {side}_ratio either over k/d, in [0, d/k], with query, key, write or read for {side}. sum_ratio is

        [tr(dMᵀ P_U dM) + tr(dM P_V dMᵀ)] / ‖dM‖² / (k_U/d + k_V/d),

    the sum of both sides in arXiv:2605.16600 over its isotropic level. Its factors, heads and null are ours.
    {side}_null_ratio_sd, {side}_z and {side}_p_value are of `rotation_null`, whose mean ratio is 1; for the
    sum, sum_null_ratio_sd and sum_z have both sides rotated independently. product_norm is ‖dM‖_F.
    `written` folds the norm and the factor between o and the stream, as for matrices.
    """
    architecture = setting.model.architecture
    for layer in range(architecture.n_layers):
        for product, left, right in _pairs(architecture, layer):
            places = frames[place_of(left)], frames[place_of(right)]
            for head, update in enumerate(head_products(left, right, params, setting.start, written=written)):
                where = {"layer": layer, "matrix": product.name, "head": head}
                yield row("product_norm", update.norm, n=len(update.left) ** 2, **where)
                if update.norm > 0:
                    yield from _compared(product, update, places, dimensions, setting.seed, where)


def head_products(
    left: ResidualMatrix, right: ResidualMatrix, after: Params, before: Params, *, written: bool = True
) -> Iterator[ProductUpdate]:
    """The update of the product of q and k, or o and v, head by head; of the larger number of heads."""
    factors = [_factors(matrix, after, before, written) for matrix in (left, right)]
    heads = max(left.heads, right.heads)
    for head in range(heads):
        (old_left, d_left), (old_right, d_right) = (
            (old[head * len(old) // heads], delta[head * len(old) // heads]) for old, delta in factors
        )
        # [dA, A₀] [B₁; dB], with A and Bᵀ of d x d_head.
        yield ProductUpdate.of(torch.cat([d_left, old_left], 1), torch.cat([old_right + d_right, d_right], 1))


def _factors(
    matrix: ResidualMatrix, after: Params, before: Params, written: bool
) -> tuple[Float[Tensor, "heads d d_head"], Float[Tensor, "heads d d_head"]]:
    """A matrix before, and its update, head by head with the residual stream's side first; in fp64."""
    old = _whole(matrix, before, written)
    factors = None
    if isinstance(after, Adapted) and after.base is before:
        factors = after.update_of(matrix, written)
    if factors is None:
        delta = _whole(matrix, after, written) - old
    else:
        delta = (factors.b.double() @ factors.a.double()).cpu()
    return _by_head(matrix, old), _by_head(matrix, delta)


def _whole(matrix: ResidualMatrix, params: Params, written: bool) -> Float[Tensor, "d_out d_in"]:
    whole, gain = matrix.of(params).cpu().double(), matrix.gain(params) if written else None
    return whole if gain is None else gain.cpu().double()[:, None] * whole


def _by_head(matrix: ResidualMatrix, whole: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "heads d d_head"]:
    if matrix.role == "write":
        return whole.unflatten(1, (matrix.heads, -1)).transpose(0, 1)
    return whole.unflatten(0, (matrix.heads, -1)).transpose(1, 2)


def _pairs(architecture: Architecture, layer: int) -> Iterator[tuple[Sides, ResidualMatrix, ResidualMatrix]]:
    of_layer = {matrix.kind: matrix for matrix in architecture.matrices if matrix.layer == layer}
    for product in PRODUCTS:
        if product.left in of_layer and product.right in of_layer:
            yield product, of_layer[product.left], of_layer[product.right]


def _compared(
    product: Sides,
    update: ProductUpdate,
    frames: tuple[Frame, Frame],
    dimensions: Sequence[int],
    seed: int,
    where: Mapping[str, object],
) -> Iterator[Row]:
    left, right = frames
    shares = update.left_shares(left.space).cumsum(0), update.right_shares(right.space).cumsum(0)
    spectrum, d = update.spectrum, len(update.left)
    for asked in dimensions:
        fractions, levels, spreads = [], [], []
        sides = zip((product.left_side, product.right_side), frames, shares, strict=True)
        for side, frame, inside in sides:
            k = frame.directions(asked)
            null, fraction = rotation_null(spectrum, k, seed), float(inside[k - 1])
            at = {**where, "role": "write" if side == "write" else "read"}
            at |= {"subspace": frame.place[0], "k": asked, "n": d * d}
            yield row(f"{side}_fraction", fraction, **at)
            yield row(f"{side}_ratio", fraction * d / k, **at)
            yield row(f"{side}_null_ratio_sd", null.sd * d / k, **at)
            yield row(f"{side}_z", null.z(fraction), **at)
            p, error = null.p_value(fraction)
            yield row(f"{side}_p_value", p, stderr=error, **at)
            fractions.append(fraction)
            levels.append(k / d)
            spreads.append(null.sd)
        place = f"{left.place[0]}:{right.place[0]}"
        at = {**where, "subspace": place, "k": asked, "n": d * d}
        level, sd = sum(levels), sqrt(sum(spread**2 for spread in spreads))
        yield row("sum_ratio", sum(fractions) / level, **at)
        yield row("sum_null_ratio_sd", sd / level, **at)
        if sd > 0:
            yield row("sum_z", (sum(fractions) - level) / sd, **at)
