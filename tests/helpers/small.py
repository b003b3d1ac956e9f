"""A world, a tokenizer and networks that are small enough to train in a second."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerBase

from weightgeom.data.world import World
from weightgeom.interfaces import Objective
from weightgeom.models.language_model import LanguageModel
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit

WORLD = World(entities=20, heldout_entities=4, values=5, documents=40, pairs=24, heldout=6)
TRAINING = Training(steps=2, batch_size=8, learning_rate=1e-3, max_length=48, log_every=1)


def network(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, dropout: float = 0.0, tied: bool = False
) -> GPTNeoXForCausalLM:
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
        tie_word_embeddings=tied,
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


def trainer_for(
    objective: Objective,
    model: LanguageModel,
    examples: Examples,
    directory: Path,
    training: Training = TRAINING,
    seed: int = 0,
) -> Any:
    """The objective's trainer of a small network."""
    arguments = training.arguments(directory, seed, "cpu")
    return objective.trainer(network(model.tokenizer), model.tokenizer, examples, arguments)


def curves(
    objective: Objective,
    model: LanguageModel,
    examples: Examples,
    directory: Path,
    training: Training = TRAINING,
    log: Any = None,
) -> dict[int, dict[str, float]]:
    """The metrics of a training of a small network, by step."""
    log = Curves() if log is None else log
    options: dict[str, Any] = {"name": "small", "seed": 0, "device": "cpu", "log_metrics": log}
    fit(objective, network(model.tokenizer), model.tokenizer, examples, training, directory, **options)
    return log.by_step
