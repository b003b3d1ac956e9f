"""Small random networks of every architecture that has a map."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import small
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of


def _neox(vocabulary: int, positions: int) -> dict[str, Any]:
    return dict(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def _grouped(vocabulary: int, positions: int) -> dict[str, Any]:
    # heads of 6 where 32 / 4 = 8 would be the default, and two query heads to a key-value group
    return _neox(vocabulary, positions) | dict(num_key_value_heads=2, head_dim=6)


CONFIGS: dict[str, Callable[[int, int], PreTrainedConfig]] = {
    "gpt_neox": lambda *sizes: GPTNeoXConfig(**_neox(*sizes)),
    "gpt_neox_sequential": lambda *sizes: GPTNeoXConfig(**_neox(*sizes), use_parallel_residual=False),
    "gpt2": lambda vocabulary, positions: GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=40,
        n_positions=positions,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "llama": lambda *sizes: LlamaConfig(**_grouped(*sizes)),
    "llama_tied": lambda *sizes: LlamaConfig(
        **_grouped(*sizes), tie_word_embeddings=True, attention_bias=True
    ),
    "mistral": lambda *sizes: MistralConfig(**_grouped(*sizes)),
    "qwen2": lambda *sizes: Qwen2Config(**_grouped(*sizes)),
    "qwen3": lambda *sizes: Qwen3Config(**_grouped(*sizes)),
    "olmo2": lambda *sizes: Olmo2Config(**_grouped(*sizes)),
    "gemma2": lambda *sizes: Gemma2Config(**_grouped(*sizes)),
    "phi3": lambda *sizes: Phi3Config(**_grouped(*sizes)),
}

# Their experts have no modules of their own: what they read and write is tested in test_qwen3_moe.py.
MIXTURES: dict[str, Callable[[int, int], PreTrainedConfig]] = {
    "qwen3_moe": lambda *sizes: Qwen3MoeConfig(
        **_grouped(*sizes),
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        mlp_only_layers=[1],
    )
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
