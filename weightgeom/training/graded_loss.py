"""The graded contrastive loss, a pure function of scores and grades, and the negatives it is sampled over."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from math import log
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Source = Literal["uniform", "unigram", "model"]


def graded_loss(
    scores: Float[Tensor, "*batch candidate"],
    grades: Float[Tensor, "*batch candidate"],
    tau: float,
    log_weights: Float[Tensor, "*batch candidate"] | None = None,
) -> Float[Tensor, "*batch"]:
    """-Σ_i q_i log softmax(s)_i with q = softmax(g / tau), in nats.

    At tau = 0 q is shared by the candidates of the highest grade, at tau = inf by all. With weights,
    candidate i stands for w_i candidates of its score and grade: -Σ q_i log(exp(s_i) / Σ w_j exp(s_j)),
    q_i ∝ w_i exp(g_i / tau). That estimates the loss over a whole set from a sample whose candidates
    have been drawn with probability 1 / w_i. The family is ours; its ends are cross-entropy and DPO.
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
    """The distribution q that the loss pulls the candidates to."""
    below = grades - grades.amax(-1, keepdim=True)
    exponents = below.masked_fill(below < 0, -torch.inf) if tau == 0 else below / tau
    return torch.softmax(exponents if log_weights is None else exponents + log_weights, -1)


def score_gradient(
    scores: Float[Tensor, "*batch candidate"],
    grades: Float[Tensor, "*batch candidate"],
    tau: float,
    log_weights: Float[Tensor, "*batch candidate"] | None = None,
) -> Float[Tensor, "*batch candidate"]:
    """The gradient of the loss in the scores, p - q with p = softmax(s + log w)."""
    p = torch.softmax(scores if log_weights is None else scores + log_weights, -1)
    return p - graded_target(grades, tau, log_weights)


@dataclass(frozen=True, eq=False)
class TokenContrast:
    """What the next token is contrasted with: `negatives` other tokens out of the vocabulary.

    `uniform` and `unigram` draw them for each token without replacement, and weigh each by how many
    tokens it stands for, one over its chance to be drawn. The estimate of Z = Σ exp(s) is then unbiased
    and that of the loss consistent: drawing all is the full softmax. At fewer, the loss is too low, by
    var(Z) / 2 Z² to leading order (Jensen), and its gradient, a ratio, is off, at the target by
    p var(Z) / Z². Both are O(1 / negatives). `model` takes the tokens that the policy itself prefers,
    each for itself alone: another objective, no estimate. With all V - 1 there is no draw at all.
    Source: the weights of `unigram` are those of arXiv:1903.06059, eq. 8, given the first key left out.
    """

    tau: float
    negatives: int
    source: Source
    seed: int
    log_unigram: Float[Tensor, " vocabulary"] | None = None  # of `unigram`; any constant may be added

    def losses(
        self, logits: Float[Tensor, "token vocabulary"], targets: Int[Tensor, " token"], draws: "Draws"
    ) -> tuple[Float[Tensor, " token"], "Contrasted"]:
        """The loss of each token, in nats, and what it was contrasted with."""
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
        """Tokens other than the targets, and the log of how many each stands for."""
        if self.source == "model":
            tokens = logits.scatter(1, targets[:, None], -torch.inf).topk(self.negatives).indices
            return tokens, torch.zeros_like(tokens, dtype=logits.dtype)
        vocabulary = logits.shape[1]
        chances = logits.new_zeros(vocabulary, dtype=torch.float32)  # logs, up to a constant
        if self.log_unigram is not None:
            chances = self.log_unigram.to(chances)
        # The largest of log-chances plus Gumbel noise are a draw without replacement.
        noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator).log()
        keys = (chances - noise).scatter(1, targets[:, None], -torch.inf)
        largest, tokens = keys.topk(self.negatives + 1)
        tokens, first_left_out = tokens[:, :-1], largest[:, -1:]
        if self.source == "uniform":
            return tokens, torch.full_like(tokens, log((vocabulary - 1) / self.negatives), dtype=logits.dtype)
        drawn = -torch.expm1(-(chances[tokens] - first_left_out).exp())
        return tokens, -drawn.log().to(logits.dtype)


@dataclass(frozen=True, eq=False)
class Contrasted:
    """Scores and grades of the candidates of each token; `target` is the place of the target among them."""

    scores: Float[Tensor, "token candidate"]
    grades: Float[Tensor, "token candidate"]
    target: Int[Tensor, " token"]
    log_weights: Float[Tensor, "token candidate"] | None


@dataclass(frozen=True, eq=False)
class Draws:
    """Where the randomness of a batch comes from: the step, and each sequence up to its last target.

    No state is carried along: a training that is resumed, or whose batches are split otherwise, draws
    the same for the same sequence at the same step.
    """

    step: int
    input_ids: Int[Tensor, "sequence position"]
    labels: Int[Tensor, "sequence position"]  # -100 where nothing is predicted

    def rows(self, seed: int, device: torch.device) -> Iterable[tuple[int, int, torch.Generator]]:
        """For each sequence its targets, first and behind the last, and the generator for them."""
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
