"""Predictions of held-out text: a model's loss on it and its divergence from a base."""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.geometry.divergences import kl_divergence
from weightgeom.models.language_model import LanguageModel
from weightgeom.table import Row, row
from weightgeom.text.tokens import Batch


def held_out_rows(
    model: LanguageModel, weights: Mapping[str, Tensor], base: Mapping[str, Tensor], batches: Sequence[Batch]
) -> list[Row]:
    """`heldout_ce`, -log p(token | before), and `kl_from_base`, KL(base || model); none without batches.

    Both are means over tokens, in nats per token and >= 0, with the standard error over sequences, as tokens
    of one text are not independent. Weights are those of `LanguageModel.hold`, batches on its device.
    """
    losses, divergences = [], []
    for batch in batches:
        target = batch.target[:, 1:]
        losses.append(-(model.log_probs(weights, batch).double() * target).sum(1))
        now, then = model.logits(weights, batch)[:, :-1], model.logits(base, batch)[:, :-1]
        divergence = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
        divergence[target] = kl_divergence(then, now, target).double()
        divergences.append(divergence.sum(1))
    if not losses:
        return []
    tokens = torch.cat([batch.target[:, 1:].sum(1) for batch in batches])
    return [
        _over_tokens("heldout_ce", torch.cat(losses), tokens),
        _over_tokens("kl_from_base", torch.cat(divergences), tokens),
    ]


def _over_tokens(quantity: str, sums: Float[Tensor, " sequence"], tokens: Tensor) -> Row:
    """A mean over tokens from the sums over sequences, with the error of a ratio of two means over them."""
    sums, tokens, n = sums.double(), tokens.double(), len(sums)
    mean = (sums.sum() / tokens.sum()).item()
    error = (
        sqrt((sums - mean * tokens).square().sum().item() * n / (n - 1)) / tokens.sum().item()
        if n > 1
        else None
    )
    return row(quantity, mean, n=int(tokens.sum()), unit="nats/token", stderr=error)
