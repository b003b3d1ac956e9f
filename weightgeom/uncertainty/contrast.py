"""Two groups of prompts set against each other: halves, permuted labels, and the boundary between them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import erf, sqrt
from typing import NamedTuple, TypeVar
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Contrast:
    """Which of pooled prompts count as factual (side 0) and which as uncertain (side 1), in two halves.

    The first arrangement is the true one; in the others the labels are permuted within each half, which is
    the null of two groups from one distribution. Pooled are the factual prompts, then as many uncertain ones.
    """

    train: Int[Tensor, "arrangement side half"]
    test: Int[Tensor, "arrangement side rest"]

    @classmethod
    def of(cls, size: int, permutations: int, seed: int) -> "Contrast":
        """The arrangements of two groups of `size` prompts, whose first half is for training."""
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.arange(2 * size).view(2, size)

        def arranged(part: Int[Tensor, "side some"]) -> Int[Tensor, "arrangement side some"]:
            flat = part.flatten()
            others = [flat[torch.randperm(len(flat), generator=generator)] for _ in range(permutations)]
            return torch.stack([flat, *others]).view(1 + permutations, *part.shape)

        return cls(arranged(pooled[:, : size // 2]), arranged(pooled[:, size // 2 :]))

    def sides(self, size: int | None = None) -> Int[Tensor, "arrangement side some"]:
        """Both halves of every side together, of at most `size` prompts."""
        half = None if size is None else max(1, size // 2)
        return torch.cat([self.train[..., :half], self.test[..., :half]], -1)

    def boundaries(self, states: Float[Tensor, "pooled d"]) -> Float[Tensor, "arrangement d"]:
        """b = (mean of the uncertain - mean of the factual) / its norm, on the training half.

        Raises:
            ValueError: if the means are the same.
        """
        means = states[self.train].mean(2)
        difference = means[:, 1] - means[:, 0]
        norms = difference.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            raise ValueError("the groups have the same mean state: there is no boundary direction")
        return difference / norms

    def amplification(
        self, states: Float[Tensor, "pooled d"], directions: Float[Tensor, "arrangement d"]
    ) -> tuple[Float[Tensor, " arrangement"], float]:
        """Held-out difference of the means along each direction, over the root mean square norm of a state.

        Dimensionless; 0 is no difference, and not less where it is noise. With the true one's standard error.
        """
        norm = states.square().sum(1).mean().sqrt()
        along = torch.einsum("asnd,ad->asn", states[self.test], directions) / norm
        mean = along.mean(2)
        error = float((along[0].var(1) / along.shape[2]).sum().sqrt())
        return mean[:, 1] - mean[:, 0], error


def equal_groups(groups: Mapping[str, Sequence[Item]], limit: int, seed: int) -> dict[str, list[Item]]:
    """As many prompts of every group, at most `limit`, in an order that the seed draws; the log says so."""
    size = min(limit, *map(len, groups.values()))
    if len({len(group) for group in groups.values()}) > 1 or size < max(map(len, groups.values())):
        had = ", ".join(f"{name} {len(group)}" for name, group in groups.items())
        log.info("groups of equal size: %d prompts of each (of %s)", size, had)
    found = {}
    for name, group in groups.items():
        generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
        order = torch.randperm(len(group), generator=generator).tolist()
        found[name] = [group[index] for index in order[:size]]
    return found


def two_sided(values: Float[Tensor, " arrangement"]) -> float:
    """Two-sided p-value of the first value among all, min(1, 2 min(p high, p low)) of the rank p-values.

    Valid where the first is exchangeable with the others; with n of them it is 2 / (1 + n) at the least.
    """
    n = len(values)
    high, low = (int((values >= values[0]).sum()), int((values <= values[0]).sum()))
    return min(1.0, 2 * min(high, low) / n)


class Auroc(NamedTuple):
    """Area under the ROC curve, its standard error, and the p-value of 1/2."""

    value: float
    stderr: float
    p_value: float


def auroc(low: Float[Tensor, " one"], high: Float[Tensor, " other"]) -> Auroc:
    """P(high > low) + P(high = low) / 2, with DeLong's standard error and Mann and Whitney's p-value.

    The p-value is two-sided, from the normal limit with ties.
    Source: DeLong et al. (1988), Biometrics 44:837.
    """
    low, high = low.double(), high.double()
    wins = (high[:, None] > low).double() + (high[:, None] == low).double() / 2
    value = float(wins.mean())
    variance = float(wins.mean(1).var() / len(high) + wins.mean(0).var() / len(low))
    n, m = len(low), len(high)
    _, counts = torch.cat([low, high]).unique(return_counts=True)
    ties = float((counts.double() ** 3 - counts).sum()) / ((n + m) * (n + m - 1))
    spread = sqrt(n * m / 12 * max(0.0, n + m + 1 - ties))
    distance = max(0.0, abs(value - 0.5) * n * m - 0.5)  # corrected for continuity
    p = 1 - erf(distance / spread / sqrt(2)) if spread > 0 else 1.0
    return Auroc(value, sqrt(variance), p)


def logistic_scores(
    states: Float[Tensor, "pooled d"], train: Int[Tensor, "side half"], test: Int[Tensor, "side rest"]
) -> Float[Tensor, "side rest"]:
    """Held-out log-odds of being uncertain, by an L2-penalised logistic probe of standardised states."""
    from sklearn.linear_model import LogisticRegression

    x = states.double()
    seen = x[train.flatten()]
    spread = seen.std(0)
    x = (x - seen.mean(0)) / spread.masked_fill(spread == 0, 1)
    labels = torch.arange(2).repeat_interleave(train.shape[1])
    probe = LogisticRegression(C=0.1, max_iter=1000).fit(x[train.flatten()].numpy(), labels.numpy())
    return torch.from_numpy(probe.decision_function(x[test.flatten()].numpy())).view(test.shape)


def half_samples(n: int, resamples: int, seed: int) -> list[Int[Tensor, " half"]]:
    """Random halves without replacement: over them an estimate varies as it does over samples of n.

    Drawing with replacement would give points distances of zero. The variance of a mean over n/2 of n is
    σ² (2/n - 1/n) = σ²/n.
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator)[: n // 2] for _ in range(resamples)]
