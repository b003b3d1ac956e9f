"""A world, a tokenizer and networks that are small enough to train in a second."""

from collections.abc import Mapping

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerBase

from weightgeom.data.world import World

WORLD = World(entities=20, heldout_entities=4, values=5, documents=40, pairs=24, heldout=6)


def network(tokenizer: PreTrainedTokenizerBase, seed: int = 0, dropout: float = 0.0) -> GPTNeoXForCausalLM:
    """A random GPT-NeoX of two layers, width 32, for the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout=dropout,
        bos_token_id=tokenizer.get_vocab()["<eos>"],
        eos_token_id=tokenizer.get_vocab()["<eos>"],
    )
    return GPTNeoXForCausalLM(config)


class Curves:
    """Keeps what a training logs, by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.by_step.setdefault(step, {}).update(metrics)
