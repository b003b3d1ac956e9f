"""A model's behaviour: its loss on held-out text, its preferences, and its distance from the start."""

import logging
from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.analysis.summaries import by_quantity
from weightgeom.bases.outline import Shape
from weightgeom.declarations import BEHAVIOUR, ProbeDeclaration
from weightgeom.estimators.held_out import held_out, predictions
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.table import Row, row
from weightgeom.text.tokens import packed, responses

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Behaviour:
    """Held-out behaviour, each number a mean with its standard error.

    The error of means over tokens is over sequences, as tokens of one text are not independent.

    Quantities:
        heldout_ce: -log p(token | before) on held-out text, nats per token, >= 0.
        kl_from_base: KL(base || model) of the next-token predictions there, nats per token, >= 0; the
            base is the trajectory's start, or its end where the start is random.
        preference_accuracy: share of held-out pairs whose chosen response is the likelier one, in [0, 1].
        preference_margin: log p(chosen | prompt) - log p(rejected | prompt), nats per pair.
    """

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration(
        headline="", section=BEHAVIOUR, of_pretraining=True, generic=False, needs_update=False, divisible=True
    )

    tokens: int = Field(default=4096, ge=2)  # of held-out text
    pairs: int = Field(default=96, ge=1)
    length: int = Field(default=96, ge=2)  # tokens a sequence of text
    pair_length: int = Field(default=256, ge=2)  # tokens of prompt + response

    def check(self, architecture: Architecture) -> None:
        """Every model will do."""

    def held(self, shape: Shape, objective: bool) -> float:
        """Two models, and of a batch of 16 sequences the logits: of both, of one twice, and slices."""
        tokens = min(self.tokens, 16 * self.length)
        text = 3 * shape.logits(tokens) + 4 * shape.logits(min(tokens, 256))
        pairs = 2 * shape.logits(16 * min(shape.longest, self.pair_length))
        return 2 * shape.weights + max(text, pairs)

    def summary(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """Every quantity before and after."""
        return by_quantity(table)

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint."""
        model, examples = setting.model, setting.examples
        base = model.hold(setting.end if setting.from_random else setting.start)
        texts = [
            batch.to(model.device)
            for batch in (
                packed(examples.heldout, model.tokenizer, self.length, self.tokens)
                if examples.heldout
                else []
            )
        ]
        wanted = examples.heldout_pairs[: self.pairs]
        pairs = list(responses(wanted, model.tokenizer, self.pair_length))
        missing = len(wanted) - sum(len(chosen.input_ids) for chosen, _ in pairs)
        if missing:
            log.log(
                logging.WARNING if missing > len(wanted) / 10 else logging.INFO,
                "%d of %d held-out pairs left out: prompt of %d tokens or more, the probe's pair_length",
                *(missing, len(wanted), self.pair_length),
            )

        def measure(params: Params) -> list[Row]:
            weights = model.hold(params)
            then = (predictions(model, base, batch) for batch in texts)
            rows = held_out(model, weights, then, texts).rows() if texts else []
            margins = [
                model.log_probs(weights, chosen.to(model.device)).sum(1)
                - model.log_probs(weights, rejected.to(model.device)).sum(1)
                for chosen, rejected in pairs
            ]
            if margins:
                margin = torch.cat(margins)
                rows.append(_mean("preference_accuracy", (margin > 0).float(), "1"))
                rows.append(_mean("preference_margin", margin, "nats/pair"))
            return rows

        return measure


def _mean(quantity: str, values: Tensor, unit: str) -> Row:
    values, n = values.double(), values.numel()
    error = values.std().item() / sqrt(n) if n > 1 else None
    return row(quantity, values.mean().item(), n=n, unit=unit, stderr=error)
