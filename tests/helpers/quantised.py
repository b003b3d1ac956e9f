"""Quantised copies of small checkpoints, as they are released, and their dequantised weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mxfp4 import FP4_VALUES

FP8_MAX = 448.0
CONFIGS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]},
    "tensor": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    "row": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
}


def fp8_copy(plain: Path, directory: Path, form: str) -> dict[str, Tensor]:
    """Write the checkpoint `plain` with the matrices of its layers in fp8; gives its weights, by name.

    `block` has blocks of 8 x 16 entries, `tensor` one scale a matrix, `row` one a row.
    """
    directory.mkdir()
    weights = load_file(plain / "model.safetensors")
    stored, values = dict(weights), dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 2 and ".layers." in name:
            rows, columns = weight.shape
            high, wide = {"block": (8, 16), "tensor": (rows, columns), "row": (1, columns)}[form]
            scale = torch.empty(-(-rows // high), -(-columns // wide))
            codes, values[name] = (
                torch.empty(weight.shape, dtype=torch.float8_e4m3fn),
                torch.empty_like(weight),
            )
            for i in range(len(scale)):
                for j in range(scale.shape[1]):
                    place = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
                    scale[i, j] = weight[place].abs().max() / FP8_MAX
                    codes[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
                    values[name][place] = codes[place].float() * scale[i, j]
            stored[name] = codes
            end = "_scale" if form == "row" else "_scale_inv"
            stored[name + end] = scale.reshape(()) if form == "tensor" else scale
            if form == "tensor":
                stored[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
    save_file(stored, directory / "model.safetensors")
    copy_config(plain, directory, quantization_config=CONFIGS[form])
    return values


def copy_config(plain: Path, directory: Path, **entries: Any) -> None:
    """Copy all files but the weights, with `entries` in the config."""
    for path in plain.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text()) | entries
    (directory / "config.json").write_text(json.dumps(config))


def plain_copy(plain: Path, directory: Path, values: dict[str, Tensor]) -> Path:
    """The checkpoint `plain` with other weights, in float32."""
    directory.mkdir()
    save_file(
        {name: value.float().contiguous() for name, value in values.items()}, directory / "model.safetensors"
    )
    copy_config(plain, directory)
    return directory


def gguf_copy(network: LlamaForCausalLM, path: Path, kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Write a Llama as llama.cpp's converter does, tensors in the format that `kinds` has for their ending.

    The tokenizer has bytes for tokens. Gives the dequantised weights, by name.
    """
    config: Any = network.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|endoftext|>", "</s>", *bytes_to_unicode().values(), "th"]
    tokens += [f"<unused{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    values: dict[str, Tensor] = {}
    for name, weight in network.state_dict().items():
        called = names.get_name(name, try_suffixes=(".weight",))
        assert called is not None
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        pairs = next((number for part, number in heads.items() if part in called), 0)
        order = torch.arange(len(weight))
        if pairs:  # of a head's rows, halves become neighbours
            order = order.view(pairs, 2, -1).transpose(1, 2).flatten()
        kind = GGMLQuantizationType[next((kinds[end] for end in kinds if name.endswith(end)), "F32")]
        data = quantize(weight[order].numpy(), kind)
        writer.add_tensor(called, data, raw_dtype=kind)
        values[name] = torch.from_numpy(np.array(dequantize(data, kind)))[order.argsort()]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def mxfp4_copy(plain: Path, directory: Path) -> dict[str, Tensor]:
    """Write the gpt-oss checkpoint `plain` with its experts in MXFP4; gives its weights, by name."""
    directory.mkdir()
    weights = load_file(plain / "model.safetensors")
    stored, values = dict(weights), dict(weights)
    table = torch.tensor(FP4_VALUES)
    for name, weight in weights.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            groups = weight.transpose(1, 2).unflatten(2, (-1, 32))  # expert, row, group, entry
            scale = (groups.abs().amax(-1) / 6).log2().ceil().clamp(min=-120)
            codes = (groups[..., None] / scale.exp2()[..., None, None] - table).abs().argmin(-1).byte()
            del stored[name]
            stored[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
            stored[f"{name}_scales"] = (scale + 127).byte()
            exact = table[codes.long()] * scale.exp2()[..., None]
            values[name] = exact.flatten(2).transpose(1, 2).contiguous()
    save_file(stored, directory / "model.safetensors")
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    copy_config(plain, directory, quantization_config=quantised)
    return values
