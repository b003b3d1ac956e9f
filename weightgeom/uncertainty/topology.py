"""Topology of a point cloud from its distances: components, loops and persistence, by ripser."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Persistence:
    """The distances at which the components of a cloud merge and its loops are born and die.

    `merges` has n - 1 distances for n points, in ascending order; `loops` is empty if loops were not
    requested. Both are in the unit of the distances.
    """

    merges: Float[Tensor, " merge"]
    loops: Float[Tensor, "loop 2"]

    def components(self, thresholds: Sequence[float]) -> list[int]:
        """The number of components after joining all points within each threshold of one another."""
        return [1 + int((self.merges > threshold).sum()) for threshold in thresholds]

    @property
    def entropy(self) -> float:
        """Entropy of the components' lifetimes over its maximum, in [0, 1]; 1 if all lifetimes are equal.

        -Σ p log p / log(n - 1), with p the lifetimes over their sum. Source: Chintakunta et al. (2015),
        Pattern Recognition 48:391; the normalisation is ours and makes clouds of different sizes comparable.
        """
        total = float(self.merges.sum())
        if len(self.merges) < 2 or total == 0:
            return 1.0
        p = self.merges / total
        return float(torch.special.entr(p).sum() / np.log(len(p)))

    @property
    def longest_loop(self) -> float:
        """The largest persistence of a loop, death - birth; 0 without loops."""
        return float((self.loops[:, 1] - self.loops[:, 0]).max()) if len(self.loops) else 0.0


def cosine_distances(points: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """1 - cosine between all points, in [0, 2], in fp64.

    Raises:
        ValueError: if a point is zero and so has no direction.
    """
    points = points.double().cpu()
    norms = points.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError("a state is all zero, so its cosine distance to other states is undefined")
    unit = points / norms
    between = (1 - unit @ unit.T).clamp(min=0)
    return (between - between.diag().diag()).maximum((between - between.diag().diag()).T)


def persistence(between: Float[Tensor, "n n"], *, loops: bool = True) -> Persistence:
    """Persistent homology of the Vietoris-Rips filtration, from pairwise distances.

    The time grows with the cube of the number of points, and faster with `loops`.
    """
    from ripser import ripser

    diagrams = ripser(between.numpy(), distance_matrix=True, maxdim=1 if loops else 0)["dgms"]
    merges = np.sort(diagrams[0][:, 1])[:-1]  # the last component never dies
    born_and_died = diagrams[1] if loops else np.zeros((0, 2))
    return Persistence(
        torch.from_numpy(merges.astype(np.float64)), torch.from_numpy(born_and_died.astype(np.float64))
    )
