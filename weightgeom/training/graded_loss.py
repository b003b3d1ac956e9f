"""The graded contrastive loss, a pure function of scores and grades, and the sampling of its negatives."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from math import log
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

NegativeSource = Literal["uniform", "unigram", "model"]


def graded_loss(
    scores: Float[Tensor, "*batch candidate"],
    grades: Float[Tensor, "*batch candidate"],
    tau: float,
    log_weights: Float[Tensor, "*batch candidate"] | None = None,
) -> Float[Tensor, "*batch"]:
    """-Σ_i q_i log softmax(s)_i with q = softmax(g / tau), in nats.

    At tau = 0, q is uniform over the candidates of the highest grade; at tau = inf, over all. With weights,
    candidate i stands for w_i candidates of its score and grade: -Σ q_i log(exp(s_i) / Σ w_j exp(s_j)),
    q_i ∝ w_i exp(g_i / tau). This estimates the loss over the whole set from a sample in which candidate i
    was drawn with probability 1 / w_i. The family is ours; its ends are cross-entropy and DPO.
    """
    log_probs = torch.log_softmax(scores if log_weights is None else scores + log_weights, -1)
    if log_weights is not None:
        log_probs = log_probs - log_weights
    return -(graded_target(grades, tau, log_weights) * log_probs).sum(-1)


def graded_target(
    grades: Float[Tensor, "*batch candidate"],
    tau: float,
    log_weights: Float[Tensor, "*batch candidate"] | None = None,
) -> Float[Tensor, "*batch candidate"]:
    """The target distribution q = softmax(g / tau) over the candidates."""
    below = grades - grades.amax(-1, keepdim=True)
    exponents = below.masked_fill(below < 0, -torch.inf) if tau == 0 else below / tau
    return torch.softmax(exponents if log_weights is None else exponents + log_weights, -1)


def score_gradient(
    scores: Float[Tensor, "*batch candidate"],
    grades: Float[Tensor, "*batch candidate"],
    tau: float,
    log_weights: Float[Tensor, "*batch candidate"] | None = None,
) -> Float[Tensor, "*batch candidate"]:
    """The gradient of the loss with respect to the scores, p - q with p = softmax(s + log w)."""
    p = torch.softmax(scores if log_weights is None else scores + log_weights, -1)
    return p - graded_target(grades, tau, log_weights)


@dataclass(frozen=True, eq=False)
class TokenContrast:
    """A contrast of the next token with `negatives` other tokens of the vocabulary.

    `uniform` and `unigram` draw the negatives of each token without replacement and weight each by one over
    its probability of being drawn. The estimate of Z = Σ exp(s) is then unbiased and that of the loss
    consistent, equal to the full softmax when all tokens are drawn. With fewer, the loss is too low by
    var(Z) / 2 Z² to leading order (Jensen), and its gradient at the target is off by p var(Z) / Z²; both
    biases are O(1 / negatives). `model` takes the tokens that the policy ranks highest, with weight one: a
    different objective, not an estimate. With all V - 1 negatives, nothing is drawn.
    Source: the weights of `unigram` are those of arXiv:1903.06059, eq. 8, given the first key left out.
    """

    tau: float
    negatives: int
    source: NegativeSource
    seed: int
    log_unigram: Float[Tensor, " vocabulary"] | None = None  # for `unigram`; up to an additive constant

    def losses(
        self, logits: Float[Tensor, "token vocabulary"], targets: Int[Tensor, " token"], draws: "Draws"
    ) -> tuple[Float[Tensor, " token"], "Contrasted"]:
        """The loss of each token, in nats, and its candidates."""
        contrasted = self._contrasted(logits, targets, draws)
        loss = graded_loss(contrasted.scores, contrasted.grades, self.tau, contrasted.log_weights)
        return loss, contrasted

    def _contrasted(self, logits: Tensor, targets: Tensor, draws: "Draws") -> "Contrasted":
        vocabulary = logits.shape[1]
        if self.negatives == vocabulary - 1:
            grades = torch.zeros_like(logits).scatter_(1, targets[:, None], 1)
            return Contrasted(logits, grades, targets, None)
        drawn = [
            self._negatives(logits[start:end].detach(), targets[start:end], generator)
            for start, end, generator in draws.rows(self.seed, logits.device)
        ]
        tokens = torch.cat([targets[:, None], torch.cat([tokens for tokens, _ in drawn])], 1)
        log_weights = torch.zeros_like(logits[:, : 1 + self.negatives])
        log_weights[:, 1:] = torch.cat([weights for _, weights in drawn])
        grades = torch.zeros_like(log_weights)
        grades[:, 0] = 1
        return Contrasted(logits.gather(1, tokens), grades, torch.zeros_like(targets), log_weights)

    def _negatives(
        self, logits: Tensor, targets: Tensor, generator: torch.Generator
    ) -> tuple[Int[Tensor, "token negative"], Float[Tensor, "token negative"]]:
        """Tokens other than the targets, and their log-weights."""
        if self.source == "model":
            tokens = logits.scatter(1, targets[:, None], -torch.inf).topk(self.negatives).indices
            return tokens, torch.zeros_like(tokens, dtype=logits.dtype)
        vocabulary = logits.shape[1]
        log_chances = logits.new_zeros(vocabulary, dtype=torch.float32)  # up to an additive constant
        if self.log_unigram is not None:
            log_chances = self.log_unigram.to(log_chances)
        # The largest log-chances plus Gumbel noise are a draw without replacement.
        noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator).log()
        keys = (log_chances - noise).scatter(1, targets[:, None], -torch.inf)
        largest, tokens = keys.topk(self.negatives + 1)
        tokens, first_left_out = tokens[:, :-1], largest[:, -1:]
        if self.source == "uniform":
            return tokens, torch.full_like(tokens, log((vocabulary - 1) / self.negatives), dtype=logits.dtype)
        probability = -torch.expm1(-(log_chances[tokens] - first_left_out).exp())  # of being drawn
        return tokens, -probability.log().to(logits.dtype)


@dataclass(frozen=True, eq=False)
class Contrasted:
    """Scores and grades of each token's candidates; `target` is the index of the target among them."""

    scores: Float[Tensor, "token candidate"]
    grades: Float[Tensor, "token candidate"]
    target: Int[Tensor, " token"]
    log_weights: Float[Tensor, "token candidate"] | None


@dataclass(frozen=True, eq=False)
class Draws:
    """The randomness of a batch, seeded by the step and by each sequence up to its last target.

    Without a generator carried between steps, a training that is resumed, or that splits its batches
    differently, has the same draws for the same sequence at the same step.
    """

    step: int
    input_ids: Int[Tensor, "sequence position"]
    labels: Int[Tensor, "sequence position"]  # -100 for tokens that are not targets

    def rows(self, seed: int, device: torch.device) -> Iterable[tuple[int, int, torch.Generator]]:
        """For each sequence, the range (start, end) of its targets and their generator."""
        start = 0
        for ids, labels in zip(self.input_ids.tolist(), self.labels.tolist(), strict=True):
            places = [place for place, label in enumerate(labels) if place and label != -100]
            if places:
                digest = blake2b(str(ids[: places[-1] + 1]).encode(), key=f"{seed} {self.step}".encode())
                generator = torch.Generator(device).manual_seed(
                    int.from_bytes(digest.digest()[:8], "big") >> 1
                )
                yield start, start + len(places), generator
            start += len(places)
