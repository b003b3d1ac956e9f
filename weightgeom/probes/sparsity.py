"""The share of entries that an update leaves unmoved, and the overlap of the moved with the small ones."""

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from math import exp, log, sqrt
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.geometry.subspace import leading_eigenpairs

BLOCK = 2**20  # entries at a time
MATCHED = 2**18  # entries, evenly spread, on which the null's density is matched


@dataclass(frozen=True)
class Sparsity:
    """Shares of a matrix that an update leaves unmoved, and the places of the entries that move.

    An entry is visible if it differs once both checkpoints are rounded to `grid`. Small weights have small
    steps of the grid, so that an update without any structure becomes visible in them first: every share and
    overlap comes with its mean and standard deviation under an update of iid Gaussian entries, in closed
    form, as the entries are then visible independently of each other.

    Quantities, in [0, 1]:
        unmoved_share: of entries that are equal.
        invisible_share: of entries that are equal on the grid. arXiv:2511.08567.
        relative_unmoved_share: of entries with |w₁ - w₀| ≤ η max(|w₀|, |w₁|). arXiv:2511.08567.
        absolute_unmoved_share: of entries with |w₁ - w₀| ≤ `absolute`. arXiv:2505.11711.
        low_overlap, principal_overlap: the share of the visible entries that are among the α smallest |w₀|,
            or among the α largest entries of the rank-r part of W₀. arXiv:2511.08567, arXiv:2606.07082, where
            it is compared with α.
        null_..._mean, null_..._sd: of shares under an iid update of equal norm; of overlaps under one with
            as many visible entries. Source: ours.
    """

    headline: ClassVar[str] = "invisible_share"

    eta: float = Field(default=1e-3, gt=0, lt=1)
    absolute: float = Field(default=1e-5, gt=0)  # in the units of the weights
    grid: Literal["bfloat16", "float16"] = "bfloat16"
    alpha: float = Field(default=0.3, gt=0, lt=1)  # the share of entries in a mask
    rank: int = Field(default=64, ge=1)  # of the principal part

    def of_matrix(
        self, before: Float[Tensor, "d_out d_in"], after: Float[Tensor, "d_out d_in"]
    ) -> Mapping[str, float]:
        """The quantities of one matrix, without overlaps where nothing is visible."""
        start, end = before.flatten(), after.flatten()
        sigma = float(torch.linalg.vector_norm((end - start).double())) / sqrt(len(start))
        cells = Cells.of(start, getattr(torch, self.grid))
        visible = start.to(cells.grid) != end.to(cells.grid)
        change, size = (end - start).abs(), torch.maximum(start.abs(), end.abs())
        relative, absolute = self._relative(start), start.new_tensor([self.absolute])  # of all
        quantities = {
            "unmoved_share": float((start == end).double().mean()),
            **_share("invisible_share", ~visible, cells.below, cells.above, sigma),
            **_share("relative_unmoved_share", change <= self.eta * size, *relative, sigma),
            **_share("absolute_unmoved_share", change <= self.absolute, absolute, absolute, sigma),
        }
        if not visible.any():
            return quantities
        p = cells.visible(cells.matching(float(visible.double().mean()), sigma))
        for name, small in (("low_overlap", start.abs()), ("principal_overlap", None)):
            if small is None:
                small = -_principal(before, self.rank).abs().flatten()
            quantities |= _overlap(name, smallest(small, self.alpha), visible, p)
        return quantities

    def _relative(self, start: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The fall and the rise by which an entry has moved by η of the larger of its two values."""
        towards, away = self.eta * start.abs(), self.eta / (1 - self.eta) * start.abs()
        return torch.where(start > 0, towards, away), torch.where(start > 0, away, towards)


@plain_dataclass(frozen=True, eq=False)
class Cells:
    """The fall and the rise beyond which each entry is rounded to another value of a grid."""

    grid: torch.dtype
    below: Float[Tensor, " n"]
    above: Float[Tensor, " n"]

    @classmethod
    def of(cls, entries: Float[Tensor, " n"], grid: torch.dtype) -> "Cells":
        """The distances to the middles between an entry's rounded value and its two neighbours."""
        rounded = entries.to(grid)
        up = torch.nextafter(rounded, torch.tensor(float("inf"), dtype=grid)).float()
        down = torch.nextafter(rounded, torch.tensor(-float("inf"), dtype=grid)).float()
        middle = rounded.float()
        return cls(grid, entries - (middle + down) / 2, (middle + up) / 2 - entries)

    def visible(self, sigma: float) -> Float[Tensor, " n"]:
        """The probability that each entry is visible under an iid Gaussian update."""
        return _outside(self.below, self.above, sigma)

    def matching(self, density: float, near: float) -> float:
        """The standard deviation of iid entries of which a share of `density` is visible; inf at 1, nan at 0.

        It is looked for near that of the update, `near`, first.
        Any step is visible at an entry of 0: of a density below the share of zeros it is the least one.
        """
        from scipy.optimize import brentq

        if not 0 < density < 1:
            return float("inf") if density == 1 else float("nan")
        stride = max(1, len(self.below) // MATCHED)
        below, above = self.below[::stride].contiguous(), self.above[::stride].contiguous()
        unit = float((below + above).double().mean())

        def excess(exponent: float) -> float:
            return density - float(_outside(below, above, unit * exp(exponent)).mean(dtype=torch.float64))

        least = log(1e-12)
        if excess(least) <= 0:
            return unit * exp(least)
        low, high = least, log(1e12)
        centre = log(near / unit) if near > 0 and unit > 0 else 0.0
        if least < centre - 0.2 and excess(centre - 0.2) < 0 < excess(centre + 0.2):
            low, high = centre - 0.2, centre + 0.2
        return unit * exp(brentq(excess, low, high, xtol=1e-4))  # pyright: ignore[reportArgumentType]


def _outside(below: Float[Tensor, " n"], above: Float[Tensor, " n"], sigma: float) -> Float[Tensor, " n"]:
    """P(e < -below or e > above) for a Gaussian e: a sum of two tails, of which fp32 loses no digits."""
    return torch.special.ndtr(above / -sigma) + torch.special.ndtr(below / -sigma)


def _share(
    name: str, inside: Tensor, below: Float[Tensor, " n"], above: Float[Tensor, " n"], sigma: float
) -> dict[str, float]:
    """A share of entries that stay inside an interval, their own or that of all, with its null."""
    n, total, variance = inside.numel(), 0.0, 0.0
    for low, high in zip(below.split(BLOCK), above.split(BLOCK), strict=True):
        out = _outside(low, high, sigma).double() if sigma > 0 else torch.zeros(len(low))
        total += float(out.sum()) * n / len(below)
        variance += float((out * (1 - out)).sum()) * n / len(below)
    share = float(inside.double().mean())
    return {name: share, f"null_{name}_mean": 1 - total / n, f"null_{name}_sd": sqrt(variance) / n}


def _overlap(
    name: str, mask: Float[Tensor, " n"], visible: Tensor, p: Float[Tensor, " n"]
) -> dict[str, float]:
    """The share of visible entries in a mask, and its mean and sd where entries are visible at random.

    With p_i the probability that entry i is visible and m_i its membership of the mask, the mean is
    Σ m p / Σ p = o and the variance Σ (m - o)² p (1 - p) / (Σ p)², to first order in 1/n.
    """
    total, inside, variance = float(p.sum(dtype=torch.float64)), 0.0, 0.0
    blocks = list(zip(mask.split(BLOCK), p.split(BLOCK), strict=True))
    for members, chance in blocks:
        inside += float((members * chance).sum(dtype=torch.float64))
    mean = inside / total
    for members, chance in blocks:
        variance += float(((members - mean).square() * chance * (1 - chance)).sum(dtype=torch.float64))
    sd = sqrt(variance) / total
    count = int(visible.sum())
    overlap = float(mask[visible].sum(dtype=torch.float64)) / count if count else float("nan")
    return {name: overlap, f"null_{name}_mean": mean, f"null_{name}_sd": sd}


def smallest(values: Float[Tensor, " n"], share: float) -> Float[Tensor, " n"]:
    """Membership, in [0, 1], of the smallest entries; entries that tie at the edge share the remainder."""
    size = max(1, round(share * len(values)))
    edge = values.kthvalue(size).values
    below, ties = values < edge, values == edge
    return below.float() + ties.float() * ((size - int(below.sum())) / int(ties.sum()))


def _principal(matrix: Float[Tensor, "d_out d_in"], rank: int) -> Float[Tensor, "d_out d_in"]:
    """The part of a matrix along its top singular directions."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    basis = leading_eigenpairs((wide @ wide.T).double(), min(rank, len(wide)))[1].to(wide)
    part = basis @ (basis.T @ wide)
    return part if wide is matrix else part.T
