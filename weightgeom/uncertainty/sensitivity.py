"""Dependence of the prediction on the hidden state: Fisher sensitivity, and coupling to given tokens."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Readout = Callable[[Float[Tensor, "prompt d"]], Float[Tensor, "prompt vocabulary"]]
"""The rest of the network after a layer: maps every prompt's state at its last token to its logits."""


def fisher_sensitivity(
    readout: Readout,
    states: Float[Tensor, "prompt d"],
    direction: Float[Tensor, " d"],
    size: float,
    logits: Float[Tensor, "prompt vocabulary"] | None = None,
) -> Float[Tensor, " prompt"]:
    """Symmetric KL between the predictions at h and at h + size b, over size²: nats per squared unit of h.

    [KL(p‖q) + KL(q‖p)] / size² → bᵀ Jᵀ (diag p - p pᵀ) J b as size → 0, with J the readout's Jacobian: the
    Fisher information along b. `logits` are those at h, if already known. Source: arXiv:2603.13911.
    """
    base = readout(states) if logits is None else logits
    return symmetric_kl(base, readout(states + size * direction.to(states))) / size**2


def symmetric_kl(
    base: Float[Tensor, "prompt vocabulary"], other: Float[Tensor, "prompt vocabulary"]
) -> Float[Tensor, " prompt"]:
    """KL(p‖q) + KL(q‖p) between two sets of logits, in nats.

    With x = log q - log p this is Σ p x (eˣ - 1), a sum without negative terms, so fp32 suffices for nearly
    equal predictions: an error common to all x enters squared.
    """
    p, q = base.softmax(-1), other.softmax(-1)
    x = other - base
    x = x - (other.logsumexp(-1) - base.logsumexp(-1))[:, None]
    near = x.abs() < 1
    return torch.where(near, p * x * x.where(near, 0).expm1(), x * (q - p)).sum(-1)


def quadratic_size(
    readout: Readout,
    states: Float[Tensor, "prompt d"],
    direction: Float[Tensor, " d"],
    start: float,
    tolerance: float = 0.05,
) -> tuple[float, float]:
    """The first of start, start/2, ... (five sizes) whose sensitivity equals that at half the size.

    Also returns the remaining relative difference; if it exceeds `tolerance`, no size was small enough, or
    rounding errors dominate.
    """
    logits, size = readout(states), start
    wide = float(fisher_sensitivity(readout, states, direction, size, logits).mean())
    difference = float("inf")
    for _ in range(5):
        half = float(fisher_sensitivity(readout, states, direction, size / 2, logits).mean())
        difference = abs(wide - half) / half if half > 0 else float(wide > 0)
        if difference <= tolerance:
            break
        size, wide = size / 2, half
    return size, difference


def token_gradients(
    readout: Readout, states: Float[Tensor, "prompt d"], tokens: Sequence[int]
) -> Float[Tensor, "prompt d"]:
    """Gradient of the summed logits of `tokens` with respect to every prompt's state."""
    with torch.enable_grad():
        leaf = states.detach().clone().requires_grad_()
        total = readout(leaf)[:, sorted(set(tokens))].sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def coupling(
    directions: Float[Tensor, "direction d"], gradients: Float[Tensor, "prompt d"]
) -> Float[Tensor, "direction prompt"]:
    """Cosine of every direction with every prompt's gradient, in [-1, 1]; 0 where the gradient is zero."""
    norms = gradients.norm(dim=1, keepdim=True)
    unit = gradients / norms.masked_fill(norms == 0, 1)
    return (directions / directions.norm(dim=1, keepdim=True)).to(unit) @ unit.T
