"""Predictions of held-out text: a model's loss on it and its divergence from a base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightgeom.geometry.divergences import kl_divergence
from weightgeom.models.language_model import LanguageModel
from weightgeom.table import Row, row
from weightgeom.text.tokens import Batch


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Sums over the tokens of every sequence, in nats, and their numbers."""

    losses: Float[Tensor, " sequence"]  # -log p(token | before)
    divergences: Float[Tensor, " sequence"]  # KL(base || model)
    tokens: Int[Tensor, " sequence"]

    def rows(self) -> list[Row]:
        """`heldout_ce` and `kl_from_base`, in nats per token and >= 0."""
        return [
            over_tokens("heldout_ce", self.losses, self.tokens),
            over_tokens("kl_from_base", self.divergences, self.tokens),
        ]


def held_out(
    model: LanguageModel, weights: Mapping[str, Tensor], base: Mapping[str, Tensor], batches: Sequence[Batch]
) -> HeldOut:
    """Loss and divergence on one batch or more.

    Weights are those of `LanguageModel.hold`, and batches lie on the model's device.
    """
    losses, divergences = [], []
    for batch in batches:
        target = batch.target[:, 1:]
        losses.append(-(model.log_probs(weights, batch).double() * target).sum(1))
        now, then = model.logits(weights, batch)[:, :-1], model.logits(base, batch)[:, :-1]
        divergence = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
        divergence[target] = kl_divergence(then, now, target).double()
        divergences.append(divergence.sum(1))
    tokens = torch.cat([batch.target[:, 1:].sum(1) for batch in batches])
    return HeldOut(torch.cat(losses), torch.cat(divergences), tokens)


def over_tokens(quantity: str, sums: Float[Tensor, " sequence"], tokens: Int[Tensor, " sequence"]) -> Row:
    """A mean over tokens from the sums over sequences, with the error of a ratio of two means over them.

    The error is over sequences, as tokens of one text are not independent.
    """
    sums, counts, n = sums.double(), tokens.double(), len(sums)
    mean = (sums.sum() / counts.sum()).item()
    error = (
        sqrt((sums - mean * counts).square().sum().item() * n / (n - 1)) / counts.sum().item()
        if n > 1
        else None
    )
    return row(quantity, mean, n=int(counts.sum()), unit="nats/token", stderr=error)
