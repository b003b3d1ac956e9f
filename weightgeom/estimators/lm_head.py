"""The head of a frozen network by slices of tokens: never the logits of a whole batch, and never twice."""

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightgeom.compat.fused_head import FusedOutputs, has_further_terms, with_fused_head
from weightgeom.geometry.gram import product

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

LOGITS = 2**23  # entries that are held at once: 32 MiB in fp32
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # of the logits, by the names that configs have for them
DIVISORS = ("logits_scaling",)


class TokenLogProbs(torch.autograd.Function):
    """Log-probability of each target given its hidden state, with the gradient taken on the way.

    A token's log-probability depends on its own hidden state alone, so that its gradient is one vector a
    token, which the forward pass computes from the logits while it has them: two products with the
    unembedding, where a head that recomputes its logits takes three. There is no gradient of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None
    ) -> Tensor:
        """The log-probabilities, some hidden states at a time."""
        log_probs, gradients = [], []
        size = max(1, LOGITS // len(weight))
        for states, ids in zip(hidden.split(size), targets.split(size), strict=True):
            logits, slope = product(states, weight, bias).float(), None
            if cap is not None:
                logits = logits.div_(cap).tanh_()
                slope = 1 - logits.square()
                logits *= cap
            picked, top = logits.gather(1, ids[:, None])[:, 0], logits.amax(1)
            probabilities = torch.softmax(logits, 1, out=logits)
            normaliser = top - probabilities.amax(1).log()  # of the largest, which is at least one over V
            log_probs.append(picked - normaliser)
            probabilities[torch.arange(len(ids), device=ids.device), ids] -= 1
            if slope is not None:
                probabilities *= slope
            gradients.append(-product(probabilities.to(weight.dtype), weight.T))
        ctx.save_for_backward(torch.cat(gradients) if gradients else hidden)
        return torch.cat(log_probs) if log_probs else hidden.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Each token's gradient, scaled by the upstream gradient."""
        (gradients,) = ctx.saved_tensors
        return outputs[0][:, None].to(gradients) * gradients, None, None, None, None


def token_log_probs(
    network: "PreTrainedModel", hidden: Float[Tensor, "token d"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Log-probability (nats) of each target given the final hidden state before it, differentiable in it.

    Raises:
        NotImplementedError: if the network multiplies its logits and the head has a bias.
    """
    head: Any = network.get_output_embeddings()
    cap = getattr(network.config, "final_logit_softcapping", None)
    if (factor := logit_factor(network.config)) != 1:
        if head.bias is not None:
            raise NotImplementedError("the network multiplies its logits, the bias of its head included")
        hidden = factor * hidden
    return TokenLogProbs.apply(hidden, head.weight, head.bias, targets, cap)  # pyright: ignore


def logits_of(
    network: "PreTrainedModel", hidden: Float[Tensor, "token d"]
) -> Float[Tensor, "token vocabulary"]:
    """The logits that the final hidden states lead to, as the network's own forward pass makes them."""
    head = network.get_output_embeddings()
    assert head is not None
    logits, factor = head(hidden), logit_factor(network.config)
    logits = logits if factor == 1 else factor * logits
    cap = getattr(network.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def logit_factor(config: "PreTrainedConfig") -> float:
    """The constant that a network multiplies its logits by, 1 in most (Cohere, Granite, Falcon-H1)."""
    factors = [getattr(config, name, None) for name in MULTIPLIERS]
    divisors = [getattr(config, name, None) for name in DIVISORS]
    given = prod(factor for factor in factors if factor is not None)
    return given / prod(divisor for divisor in divisors if divisor is not None)


def slice_head(trainer: "Trainer", network: "PreTrainedModel") -> None:
    """Let a TRL trainer take the log-probabilities of its frozen `network` from here; mutates `network`.

    The trainer's loss is its own; its further log entries are left out. Its own head remains where more than
    log-probabilities enters the loss (weighted losses, routers).
    """
    if has_further_terms(trainer):
        return

    def sliced(labels: Tensor, *given: Any, **named: Any) -> FusedOutputs:
        hidden = network.base_model(*given, **{**named, "use_cache": False}).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        of_targets = token_log_probs(network, hidden[mask], labels[:, 1:][mask])
        log_probs = of_targets.new_zeros(mask.shape).masked_scatter(mask, of_targets)
        nothing = torch.zeros_like(log_probs).detach()
        return FusedOutputs(log_probs, mask, nothing, nothing.bool(), mean_logits=nothing)

    network.forward = with_fused_head(network.forward, sliced)
