"""Predictions of held-out text: a model's loss on it and its divergence from a base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightgeom.geometry.divergences import divergences
from weightgeom.geometry.gram import Products
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


@dataclass(frozen=True, eq=False)
class Predictions:
    """The logits of one model at the targets of a batch, and their log-normalisers."""

    logits: Float[Tensor, "token vocabulary"]
    normaliser: Float[Tensor, " token"]


def predictions(model: LanguageModel, weights: Mapping[str, Tensor], batch: Batch) -> Predictions:
    """The predictions of every target of a batch but the first token of a sequence, which has none."""
    logits = _at_targets(model, weights, batch)
    return Predictions(logits, torch.cat([part.logsumexp(-1) for part in logits.split(256)]))


def _at_targets(
    model: LanguageModel, weights: Mapping[str, Tensor], batch: Batch
) -> Float[Tensor, "token vocabulary"]:
    with Products():
        return model.logits(weights, batch)[:, :-1][batch.target[:, 1:]].float()


def held_out(
    model: LanguageModel,
    weights: Mapping[str, Tensor],
    base: Iterable[Predictions],
    batches: Sequence[Batch],
) -> HeldOut:
    """Loss and divergence on one batch or more, by one pass, with the `predictions` of a base for each batch.

    Weights are those of `LanguageModel.hold`, and batches lie on the model's device. In fp32
    (`weightgeom.geometry.divergences.divergences`), the sums in fp64.
    """
    losses, kls = [], []
    for batch, then in zip(batches, base, strict=True):
        target = batch.target[:, 1:]
        now = _at_targets(model, weights, batch)
        kl, normaliser = divergences(then.logits, then.normaliser, now)
        chosen = now.gather(-1, batch.input_ids[:, 1:][target][:, None])[:, 0]
        del now
        for sums, values in ((losses, normaliser - chosen), (kls, kl)):
            of_sequences = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
            of_sequences[target] = values.double()
            sums.append(of_sequences.sum(1))
    tokens = torch.cat([batch.target[:, 1:].sum(1) for batch in batches])
    return HeldOut(torch.cat(losses), torch.cat(kls), tokens)


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
