import pytest
from transformers import (
    AutoConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from weightgeom.models.small_config import small_config


@pytest.mark.parametrize(
    ("heads", "groups", "small"),
    [(32, 32, 4), (32, 8, 2), (32, 1, 1), (28, 4, 2)],  # as many, fewer, one for all
)
def test_the_share_of_key_value_heads_is_kept_in_four_heads(heads, groups, small):
    config = small_config(
        LlamaConfig(hidden_size=64 * heads, num_attention_heads=heads, num_key_value_heads=groups)
    )
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, small)


def test_heads_are_as_wide_as_by_default_or_wider():
    default = LlamaConfig(hidden_size=4096, num_attention_heads=32, head_dim=128)
    wide = LlamaConfig(hidden_size=4096, num_attention_heads=32, head_dim=256)
    assert [small_config(config).head_dim for config in (default, wide)] == [8, 16]  # 32 / 4 = 8


def test_layers_reach_to_the_first_of_the_last_sort():
    # Five layers of sliding attention, then a full one; three with rotary positions, then one without.
    assert small_config(Gemma3TextConfig()).layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert small_config(SmolLM3Config()).no_rope_layers == [1, 1, 1, 0]
    assert small_config(LlamaConfig()).num_hidden_layers == 2


def test_layers_with_and_without_experts_are_kept():
    config = small_config(Qwen3MoeConfig(mlp_only_layers=[0, 1, 2], num_experts=128, num_experts_per_tok=8))
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (4, 4, 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_biases_and_tying_are_kept(bias, tied):
    config = small_config(LlamaConfig(attention_bias=bias, tie_word_embeddings=tied))
    assert (config.attention_bias, config.tie_word_embeddings) == (bias, tied)


def test_scaled_positions_and_quantisation_are_left_out():
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    config = AutoConfig.for_model(
        "llama", rope_parameters=scaling, quantization_config={"quant_method": "fp8"}
    )
    assert config.rope_parameters["rope_type"] == "linear"
    small = small_config(config)
    assert small.rope_parameters["rope_type"] == "default"
    assert getattr(small, "quantization_config", None) is None


@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_sizes_have_the_names_that_the_type_gives_them(model_type):
    config = small_config(AutoConfig.for_model(model_type))
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (32, 4, 2, 32)


def test_opt_has_embeddings_as_wide_as_its_stream():
    config = small_config(OPTConfig())
    assert config.word_embed_proj_dim == config.hidden_size == 32 and config.ffn_dim == 40


@pytest.mark.parametrize(("heads", "groups", "small"), [(128, 8, 2), (71, 71, 4)])  # Falcon 40B and 7B
def test_falcon_keeps_its_share_of_key_value_heads_and_a_small_mlp(heads, groups, small):
    config = small_config(
        FalconConfig(hidden_size=64 * heads, num_attention_heads=heads, num_kv_heads=groups)
    )
    assert (config.num_attention_heads, config.num_kv_heads, config.ffn_hidden_size) == (4, small, 40)


def test_both_sorts_of_attention_of_gpt_neo_are_kept():
    assert small_config(GPTNeoConfig()).attention_layers == ["global", "local"]
