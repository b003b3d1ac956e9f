"""Weights in memory are those that the same network has on disk, for every architecture."""

from pathlib import Path

import networks
import pytest
import torch
from transformers import AutoModelForCausalLM

from weightgeom.bases.sources import source_of
from weightgeom.models.loading import load_network
from weightgeom.models.residual import architecture_of


@pytest.mark.parametrize("name", networks.CONFIGS | networks.MIXTURES)
def test_a_network_and_its_state_dict_have_the_weights_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    networks.save(name, tmp_path)
    stored = source_of(tmp_path, "before")
    network = load_network(tmp_path)
    architecture = architecture_of(network.config)
    expected = stored.params(architecture)
    for given in (network, network.state_dict()):
        params = source_of(given, "after").params(architecture, expected)
        assert set(params) == set(expected)
        assert all(torch.equal(params[key], expected[key]) for key in expected)
        for matrix in architecture.matrices:
            torch.testing.assert_close(matrix.of(params), matrix.of(expected), rtol=0, atol=0)


def test_the_weights_of_a_network_are_its_own_memory_without_its_graph() -> None:
    network = AutoModelForCausalLM.from_config(networks.CONFIGS["llama"](50, 32))
    source = source_of(network, "before")
    weight = source.params(architecture_of(network.config))["lm_head.weight"]
    assert weight.data_ptr() == network.lm_head.weight.data_ptr()
    assert not weight.requires_grad and network.lm_head.weight.requires_grad


def test_a_tied_network_has_its_unembedding_by_both_names() -> None:
    config = networks.CONFIGS["llama_tied"](50, 32)
    network = AutoModelForCausalLM.from_config(config)
    state = {name: weight for name, weight in network.state_dict().items() if name != "lm_head.weight"}
    for given in (network, state):
        params = source_of(given, "before").params(architecture_of(config))
        assert torch.equal(params["lm_head.weight"], params["model.embed_tokens.weight"])


def test_a_vocabulary_of_another_size_in_memory_is_compared_where_it_is_shared() -> None:
    small, large = (
        AutoModelForCausalLM.from_config(networks.CONFIGS["llama"](vocabulary, 32)) for vocabulary in (50, 53)
    )
    architecture = architecture_of(small.config)
    before = source_of(small, "before").params(architecture)
    after = source_of(large, "after").params(architecture, before)
    assert torch.equal(after["lm_head.weight"], large.lm_head.weight[:50])
