"""The network that the objectives train, before training."""

import pytest
import small

from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.text.examples import Examples


@pytest.fixture(scope="module")
def examples() -> Examples:
    return small.WORLD.examples()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer = small.WORLD.tokenizer()
    network = small.network(tokenizer)
    return LanguageModel(network, tokenizer, architecture_of(network.config))
