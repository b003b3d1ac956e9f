"""Proxies are in proportion to their networks, and their stand-in text has the lengths of the real text."""

import pytest
import small
import torch
from networks import CONFIGS, MIXTURES, language_model
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

from runners.planning.live_memory import LiveMemory
from runners.planning.proxy import lengths_by, proxy_of, standin, standin_tokenizer
from weightgeom.models.loading import parameters_of
from weightgeom.models.residual import architecture_of

LARGE = [
    DeepseekV3Config(
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 32),
        hidden_size=2048,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=16,
        n_group=1,
        topk_group=1,
    ),
    GPTNeoXConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192),
    LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    FalconConfig(hidden_size=8192, num_attention_heads=128, num_kv_heads=8, new_decoder_architecture=True),
    OPTConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        ffn_dim=8192,
        word_embed_proj_dim=2048,
        max_position_embeddings=16,  # their table has another proportion
    ),
    Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128
    ),
]


@pytest.mark.parametrize("config", LARGE, ids=lambda config: config.model_type)
def test_the_parameters_of_a_proxy_are_in_proportion_to_those_of_its_network(config) -> None:
    proxy = proxy_of(config)
    assert parameters_of(proxy.config) < 5e7
    scaled = parameters_of(proxy.config) * proxy.layers * proxy.width**2
    assert scaled == pytest.approx(parameters_of(config), rel=0.02)


@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES])
def test_a_small_network_is_its_own_proxy_in_every_architecture(name: str) -> None:
    config = (CONFIGS | MIXTURES)[name](100, 128)
    proxy = proxy_of(config)
    assert (proxy.layers, proxy.width) == (1, 1)
    assert parameters_of(proxy.config) == parameters_of(config)
    assert architecture_of(proxy.config) == architecture_of(config)


def test_parameters_are_counted_without_weights() -> None:
    model, weights = language_model("llama_tied", small.WORLD.tokenizer())
    config = AutoConfig.for_model(**model.network.config.to_dict())
    assert parameters_of(config) == sum(weight.numel() for weight in weights.values())


def test_the_standin_of_examples_has_as_many_tokens() -> None:
    examples, tokenizer, ours = small.WORLD.examples(), small.WORLD.tokenizer(), standin_tokenizer()
    made = standin(examples, lengths_by(tokenizer))
    for real, random in zip(examples.pairs, made.pairs, strict=True):
        for text, words in zip((real.prompt, real.chosen), (random.prompt, random.chosen), strict=True):
            assert len(tokenizer(str(text))["input_ids"]) == len(ours(str(words))["input_ids"])
    assert len(made.heldout) == len(examples.heldout)


def test_live_tensors_are_counted_while_they_live() -> None:
    with LiveMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1  # 4000 bytes each
        a.add_(b[:10].sum())  # a view is no tensor of its own; the sum has 4 bytes
        del b
        c = torch.zeros(500)
    assert memory.now == 4000 + 2000
    assert memory.peak == 4000 + 4000 + 4
    del a, c
