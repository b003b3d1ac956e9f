"""A small random GPT-NeoX by its weights, and updates of it."""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

CONFIG = GPTNeoXConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
)


def base(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of `CONFIG`, by name."""
    torch.manual_seed(seed)
    network = GPTNeoXForCausalLM(CONFIG)
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    # Biases are 0 at first, and those of a trained network are not.
    return {
        name: weight if weight.any() else 0.02 * torch.randn(weight.shape) for name, weight in weights.items()
    }


def moved(before: dict[str, torch.Tensor], updates: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with updates added to some of them."""
    return {name: weight + updates.get(name, torch.zeros(())) for name, weight in before.items()}


def gaussian(before: dict[str, torch.Tensor], scale: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """Gaussian updates whose norm is `scale` times that of each weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * weight.norm() / weight.numel() ** 0.5 * torch.randn(weight.shape, generator=generator)
        for name, weight in before.items()
    }
