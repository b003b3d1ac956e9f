"""The head of a frozen network by slices of tokens: never the logits of a whole batch, and never twice."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightgeom.compat.fused_head import FusedOutputs, has_further_terms, with_fused_head
from weightgeom.geometry.gram import product

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

LOGITS = 2**23  # entries that are held at once: 32 MiB in fp32
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


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
        for some, ids in zip(hidden.split(size), targets.split(size), strict=True):
            logits, slope = product(some, weight, bias).float(), None
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
        """Each token's gradient, scaled by what comes back."""
        (gradients,) = ctx.saved_tensors
        return outputs[0][:, None].to(gradients) * gradients, None, None, None, None


def token_log_probs(
    network: "PreTrainedModel", hidden: Float[Tensor, "token d"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Log-probability (nats) of each target given the final hidden state before it, differentiable in it."""
    head = network.get_output_embeddings()
    cap = getattr(network.config, "final_logit_softcapping", None)
    return TokenLogProbs.apply(hidden, head.weight, head.bias, targets, cap)  # pyright: ignore


def logits_of(
    network: "PreTrainedModel", hidden: Float[Tensor, "token d"]
) -> Float[Tensor, "token vocabulary"]:
    """The logits that the final hidden states lead to, as the network's own forward pass makes them.

    Raises:
        NotImplementedError: if the network scales its logits, which no architecture with a map does.
    """
    if scaled := [name for name in SCALES if getattr(network.config, name, None) not in (None, 1, 1.0)]:
        raise NotImplementedError(f"the network scales its logits by {scaled[0]}: add that to logits_of")
    head = network.get_output_embeddings()
    assert head is not None
    logits = head(hidden)
    cap = getattr(network.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def slice_head(trainer: "Trainer", network: "PreTrainedModel") -> None:
    """Let a TRL trainer take the log-probabilities of its frozen `network` from here; mutates `network`.

    The trainer's loss is its own; what it logs beside is left out. Its own head remains where more than
    log-probabilities enters the loss (weighted losses, routers), or logits are scaled.
    """
    scaled = any(getattr(network.config, name, None) not in (None, 1, 1.0) for name in SCALES)
    if scaled or has_further_terms(trainer):
        return

    def sliced(labels: Tensor, *given: Any, **named: Any) -> FusedOutputs:
        hidden = network.base_model(*given, **{**named, "use_cache": False}).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        found = token_log_probs(network, hidden[mask], labels[:, 1:][mask])
        log_probs = found.new_zeros(mask.shape).masked_scatter(mask, found)
        nothing = torch.zeros_like(log_probs).detach()
        return FusedOutputs(log_probs, mask, nothing, nothing.bool(), mean_logits=nothing)

    network.forward = with_fused_head(network.forward, sliced)
