"""Quantised copies of small checkpoints, as they are released, with the dequantised weights beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
