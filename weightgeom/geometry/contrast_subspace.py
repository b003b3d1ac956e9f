"""The subspace in which the states of two groups of prompts differ, also for groups with shuffled labels."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightgeom.geometry.subspace import Subspace

ENERGY = 0.95  # of a group's states, in the leading directions that stand for them
RESOLUTION = 1e-5  # of the states' root mean square norm: smaller differences are rounding


@dataclass(frozen=True, eq=False)
class ContrastSubspace:
    """States of two groups of equal size at one place, as coordinates in an orthonormal basis of their span.

    `states` lists the first group, then the second. `orders` are arrangements of them: the first is the true
    one, the others shuffle the labels, which is the null of two groups from one distribution.
    """

    span: Float[Tensor, "d r"]
    states: Float[Tensor, "pooled r"]
    orders: Int[Tensor, "arrangement pooled"]

    @classmethod
    def of(
        cls, first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], permutations: int, seed: int
    ) -> "ContrastSubspace":
        """The contrast of two groups, with this many shuffled ones."""
        pooled = torch.cat([first, second]).double()
        span = torch.linalg.qr(pooled.T).Q
        generator = torch.Generator().manual_seed(seed)
        shuffled = [torch.randperm(len(pooled), generator=generator) for _ in range(permutations)]
        return cls(span, pooled @ span, torch.stack([torch.arange(len(pooled)), *shuffled]))

    def space(self, k: int) -> Subspace | None:
        """The first k directions of the contrast, or as many as there are; None where the groups are alike.

        The first is the difference of the means, m_A - m_B. The next are the eigenvectors of the difference
        of the covariances, C_A - C_B, outside of it, by the size of their eigenvalues: the directions in
        which one group varies more than the other. Exchanging the groups changes nothing. Source:
        difference of means, arXiv:2406.11717, section 2.3; difference of covariances, Abid et al. (2018),
        Nat. Commun. 9:2134, with contrast 1. Their joint use, and eigenvalues of either sign, are ours.
        """
        directions = _arranged(self, k)[0]
        return Subspace(self.span @ directions) if directions.shape[1] else None

    def ratios(self, gram: Float[Tensor, "d d"], k: int) -> Float[Tensor, " arrangement"]:
        """The share of a Gram matrix's trace in the subspace of every arrangement, over its dimension / d.

        The first is the true one. Arrangements whose groups are alike are left out.
        """
        inside = self.span.T @ (gram.double() @ self.span) / gram.double().trace()
        ratios = [
            (directions * (inside @ directions)).sum() * len(gram) / directions.shape[1]
            for directions in _arranged(self, k)
            if directions.shape[1]
        ]
        return torch.stack(ratios)

    @cached_property
    def group_overlaps(self) -> tuple[Float[Tensor, " arrangement"], tuple[int, int]]:
        """The overlap of the two groups' leading directions in every arrangement, and their true numbers.

        ‖V_Aᵀ V_B‖²_F / min(k_A, k_B), with V the fewest right singular vectors of a group's states that hold
        95 % of their energy. Source: the mode subspace overlap of arXiv:2505.14185; the shuffled groups are
        ours.
        """
        overlaps, sizes = [], (0, 0)
        for index, order in enumerate(self.orders):
            first, second = (_leading(group) for group in self.states[order].chunk(2))
            overlaps.append((first.T @ second).square().sum() / min(first.shape[1], second.shape[1]))
            if index == 0:
                sizes = first.shape[1], second.shape[1]
        return torch.stack(overlaps).clamp(max=1.0), sizes

    def _directions(self, order: Int[Tensor, " pooled"], k: int) -> Float[Tensor, "r _"]:
        first, second = self.states[order].chunk(2)
        floor = RESOLUTION * float(self.states.square().sum(1).mean().sqrt())
        difference = first.mean(0) - second.mean(0)
        length = float(difference.norm())
        mean = difference[:, None] / length if length > floor else difference.new_zeros(len(difference), 0)
        covariances = []
        for group in (first, second):
            centred = group - group.mean(0)
            centred = centred - (centred @ mean) @ mean.T
            covariances.append(centred.T @ centred / len(group))
        values, vectors = torch.linalg.eigh(covariances[0] - covariances[1])
        strongest = values.abs().argsort(descending=True)
        strongest = strongest[values.abs()[strongest] > floor**2]
        return torch.cat([mean, vectors[:, strongest]], 1)[:, :k]


@lru_cache(maxsize=2)  # neighbouring matrices share a place; bases of all places would fill the memory
def _arranged(contrast: ContrastSubspace, k: int) -> list[Tensor]:
    return [contrast._directions(order, k) for order in contrast.orders]


def _leading(states: Float[Tensor, "n r"]) -> Float[Tensor, "r _"]:
    _, values, right = torch.linalg.svd(states, full_matrices=False)
    shares = values.square() / values.square().sum()
    return right[: int((shares.cumsum(0) < ENERGY).sum()) + 1].T
