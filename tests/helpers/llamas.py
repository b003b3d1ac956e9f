"""Two random Llamas over the world's tokenizer, in memory and on disk, and the text to measure them on."""

from pathlib import Path
from typing import Any

import small
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = list(small.WORLD.examples().text)
TOKENIZER = small.WORLD.tokenizer()
FEW = 256  # tokens, enough for a test


def llama(seed: int, layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def saved(network: LlamaForCausalLM, directory: Path) -> Path:
    network.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory
