"""Fixtures and settings of all tests; `tests/conftest.py` loads them where tests run."""

import pytest
import torch
from hypothesis import settings
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from weightgeom.data.world import World
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.text.examples import Examples

torch.set_num_threads(1)  # the networks are too small for more
settings.register_profile("shared machine", deadline=None, max_examples=50)
settings.load_profile("shared machine")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def world() -> World:
    return World(entities=20, heldout_entities=4, values=5, documents=20, pairs=20, heldout=6)


@pytest.fixture(scope="session")
def examples(world: World) -> Examples:
    return world.examples()


@pytest.fixture(scope="session")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return world.tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A small random GPT-NeoX whose norms have gains; nobody mutates it."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=1,
    )
    network = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / 4
        parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return LanguageModel(network, tokenizer, architecture_of(config))


@pytest.fixture
def params(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights of `model`, a copy."""
    return {name: parameter.clone() for name, parameter in model.network.named_parameters()}
