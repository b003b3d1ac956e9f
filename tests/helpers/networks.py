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
}

# One network of each form: fused, transposed, with grouped heads, norms behind, or biases.
FORMS = ("gpt_neox", "gpt2", "llama", "llama_tied", "phi3", "olmo2", "gemma2", "opt")

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


def save(name: str, directory: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """A checkpoint of a small random network of an architecture, with the world's tokenizer."""
    tokenizer = small.WORLD.tokenizer()
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config((CONFIGS | MIXTURES)[name](len(tokenizer), 128))
    network.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
