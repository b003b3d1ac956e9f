"""Small random networks of every architecture that has a map."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import small
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of

Config = Callable[[int, int], PreTrainedConfig]
"""Makes a config for a number of tokens in the vocabulary and one of positions."""
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SCALED = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}  # of queries by their position
PATTERN = ["sliding_attention", "full_attention"]


def plain(model_type: str, **options: Any) -> Config:
    """Configs of a type with two layers and as many key-value heads as query heads."""

    def config(vocabulary: int, positions: int) -> PreTrainedConfig:
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "max_position_embeddings": positions,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        return AutoConfig.for_model(model_type, **sizes | options)

    return config


def grouped(model_type: str, **options: Any) -> Config:
    """Configs with two query heads to a key-value group, and heads of 6 where 32 / 4 = 8 is the default."""
    return plain(model_type, num_key_value_heads=2, head_dim=6, **options)


HYBRID = ["linear_attention", "linear_attention", "full_attention"]
SHARED = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 14,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
MAMBA = {"mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_head": 6, "mamba_n_groups": 2, "mamba_d_state": 5}
MULTIPLIERS = {
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 0.6,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.5,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
    "mlp_multipliers": [0.9, 0.7],
    "key_multiplier": 0.9,
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.5,
}
ONE_MIXER_A_LAYER = ["linear_attention", "full_attention", "mlp", "linear_attention"]
OF_NEMOTRON = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 5,
    "n_routed_experts": 3,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 14,
}

CONFIGS: dict[str, Config] = {
    "gpt_neox": plain("gpt_neox"),
    "gpt_neox_sequential": plain("gpt_neox", use_parallel_residual=False),
    "gpt2": plain("gpt2", n_inner=40, pad_token_id=None),
    "llama": grouped("llama"),
    "llama_tied": grouped("llama", tie_word_embeddings=True, attention_bias=True),
    "mistral": grouped("mistral"),
    "qwen2": grouped("qwen2"),
    "qwen3": grouped("qwen3"),
    "olmo2": grouped("olmo2"),
    "gemma2": grouped("gemma2"),
    "phi3": grouped("phi3"),
    "gemma3_text": grouped("gemma3_text", layer_types=PATTERN),
    "olmo3": grouped("olmo3", layer_types=PATTERN),
    "smollm3": grouped("smollm3", no_rope_layers=[1, 0]),
    "gptj": plain("gptj", n_inner=40, rotary_dim=4),
    "opt": plain("opt", ffn_dim=40),
    "granite": plain("granite", num_key_value_heads=2, residual_multiplier=0.3, logits_scaling=4.0),
    "ministral3": grouped("ministral3", rope_parameters=ROPE | SCALED),
    "gemma": grouped("gemma"),
    "apertus": plain("apertus", num_key_value_heads=2, rope_parameters=ROPE),
    "cohere2": plain("cohere2", num_key_value_heads=2, layer_types=PATTERN, logit_scale=0.25),
    "glm4": grouped("glm4"),
    "phi": plain("phi", num_key_value_heads=2),
    "phi_norms": plain("phi", qk_layernorm=True, num_key_value_heads=2),
    "gpt_neo": plain("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=4),
    "stablelm": plain("stablelm", num_key_value_heads=2, use_qkv_bias=True),
    "stablelm_parallel": plain(
        "stablelm", num_key_value_heads=2, qk_layernorm=True, use_parallel_residual=True
    ),
    "falcon": plain("falcon", ffn_hidden_size=40),
    "falcon_sequential": plain(
        "falcon", ffn_hidden_size=40, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon_new": plain("falcon", ffn_hidden_size=40, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_one_norm": plain(
        "falcon", ffn_hidden_size=40, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "bloom": plain("bloom"),
    "qwen3_5_text": grouped("qwen3_5_text", layer_types=HYBRID[1:], **LINEAR),
    "lfm2": grouped("lfm2", layer_types=["conv", "full_attention"]),
    "falcon_h1": grouped("falcon_h1", **MAMBA, **MULTIPLIERS),
    "falcon_h1_normed": grouped("falcon_h1", mamba_rms_norm=True, **MAMBA),
    "nemotron_h": grouped("nemotron_h", layers_block_type=ONE_MIXER_A_LAYER, **OF_NEMOTRON),
}

LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
FOUR = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
DEEPSEEK = LATENT | FOUR | {"moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_shared_experts": 2}

# Their experts have no modules of their own: what they read and write is tested in test_mixtures.py.
MIXTURES: dict[str, Config] = {
    "qwen3_moe": grouped(
        "qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1]
    ),
    "mixtral": grouped("mixtral", num_local_experts=3, num_experts_per_tok=2),
    "olmoe": plain("olmoe", num_key_value_heads=2, num_experts=3, num_experts_per_tok=2),
    "gpt_oss": grouped("gpt_oss", num_local_experts=3, num_experts_per_tok=2, layer_types=PATTERN),
    "deepseek_v3": plain("deepseek_v3", num_key_value_heads=4, q_lora_rank=20, **DEEPSEEK),
    "deepseek_v3_full_q": plain(
        "deepseek_v3", num_key_value_heads=4, q_lora_rank=None, attention_bias=True, **DEEPSEEK
    ),
    "qwen3_next": grouped(
        "qwen3_next", num_hidden_layers=3, layer_types=HYBRID, mlp_only_layers=[2], **SHARED, **LINEAR
    ),
    "qwen3_5_moe_text": grouped("qwen3_5_moe_text", layer_types=HYBRID[1:], **SHARED, **LINEAR),
    "nemotron_h_moe": grouped("nemotron_h", layers_block_type=["moe", "full_attention"], **OF_NEMOTRON),
    "llama4_text": grouped("llama4_text", num_local_experts=3, moe_layers=[1], intermediate_size_mlp=44),
}


def language_model(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[LanguageModel, dict[str, torch.Tensor]]:
    """A random model of an architecture, its norms with gains, and its weights."""
    config = (CONFIGS | MIXTURES)[name](len(tokenizer), 128)
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / 4
        gain = "norm" in key or ".ln_" in key
        parameter.copy_(noise + (1 if gain and key.endswith("weight") else 0))
    weights = {key: parameter.clone() for key, parameter in network.named_parameters()}
    return LanguageModel(network, tokenizer, architecture_of(config)), weights


# One network for each way in which a map can differ: fused by head or in blocks, transposed, in groups, with
# norms behind, offsets or factors. What holds for these holds for all, of which the invariants are checked.
FORMS = ("gpt_neox", "gpt2", "phi3", "llama", "llama_tied", "olmo2", "gemma2", "opt", "granite")


def save(name: str, directory: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """A checkpoint of a small random network of an architecture, with the world's tokenizer."""
    tokenizer = small.WORLD.tokenizer()
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config((CONFIGS | MIXTURES)[name](len(tokenizer), 128))
    network.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
