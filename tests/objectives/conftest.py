"""The network that the objectives train, before training."""

import pytest
import small

from weightgeom.interfaces import Examples
from weightgeom.model import LanguageModel
from weightgeom.residual import architecture_of


@pytest.fixture(scope="module")
def examples() -> Examples:
    return small.WORLD.examples()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer = small.WORLD.tokenizer()
    network = small.network(tokenizer)
    return LanguageModel(network, tokenizer, architecture_of(network.config))
