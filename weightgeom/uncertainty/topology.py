"""Topology of a cloud of points: components, loops and persistence, from their distances by ripser."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Persistence:
    """At which distances the components of a cloud merge, and where its loops are born and die.

    `merges` has one distance for each of n points but the last, in ascending order; `loops` is empty where
    loops were not asked for. In the unit of the distances.
    """

    merges: Float[Tensor, " merge"]
    loops: Float[Tensor, "loop 2"]

    def components(self, thresholds: Sequence[float]) -> list[int]:
        """The number of components when points at most as far apart as each threshold are joined."""
        return [1 + int((self.merges > one).sum()) for one in thresholds]

    @property
    def entropy(self) -> float:
        """Entropy of the components' lifetimes over that of equal ones, in [0, 1]; 1 where all are equal.

        -Σ p log p / log(n - 1), p the lifetimes over their sum. Source: Chintakunta et al. (2015), Pattern
        Recognition 48:391; the division is ours, so that clouds of different sizes compare.
        """
        total = float(self.merges.sum())
        if len(self.merges) < 2 or total == 0:
            return 1.0
        p = self.merges / total
        return float(torch.special.entr(p).sum() / np.log(len(p)))

    @property
    def longest_loop(self) -> float:
        """The largest persistence of a loop, death - birth; 0 where there is none."""
        return float((self.loops[:, 1] - self.loops[:, 0]).max()) if len(self.loops) else 0.0


def cosine_distances(points: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """1 - cosine between all points, in [0, 2], in fp64.

    Raises:
        ValueError: if a point is zero, which has no direction.
    """
    points = points.double().cpu()
    norms = points.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError("a state is zero: it has no cosine with another")
    unit = points / norms
    between = (1 - unit @ unit.T).clamp(min=0)
    return (between - between.diag().diag()).maximum((between - between.diag().diag()).T)


def persistence(between: Float[Tensor, "n n"], *, loops: bool = True) -> Persistence:
    """Persistent homology of the Vietoris-Rips filtration of points with these distances.

    Time grows with the cube of the points and worse where there are loops to look for.
    """
    from ripser import ripser

    found = ripser(between.numpy(), distance_matrix=True, maxdim=1 if loops else 0)["dgms"]
    merges = np.sort(found[0][:, 1])[:-1]  # the last never dies
    born_and_died = found[1] if loops else np.zeros((0, 2))
    return Persistence(
        torch.from_numpy(merges.astype(np.float64)), torch.from_numpy(born_and_died.astype(np.float64))
    )
