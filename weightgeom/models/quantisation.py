"""Quantised checkpoints, which are refused: their tensors are codes of the weights, not the weights."""

import re
from collections.abc import Mapping
from typing import Any

CONFIGS = ("quantization_config", "compression_config", "quantization", "quantize_config")
TEXT = ("text_config", "llm_config", "language_config")  # of a model that also sees or hears
CODES = re.compile(r"(?:torch\.)?(?:u?int|U|I)(?:1|2|4|8|16|32)|(?:torch\.)?float(?:4|6|8)_\w+|F4|F[468]_\w+")
WHOLE_NUMBERS = re.compile(r"(?:torch\.)?(?:u?int64|bool)|U64|I64|BOOL")
# Scales, zero points and codes, as bitsandbytes, GPTQ, AWQ, MLX, compressed-tensors, fp8, ModelOpt, MXFP4,
# HQQ, Quanto, torchao, AQLM, QuIP, EETQ and EXL store them beside a weight or in its place.
COMPANION = re.compile(
    r"(?:^|[._])(?:SCB|qweight|qzeros|g_idx|absmax|quant_map|nested_\w+|weight_format|weight_packed"
    r"|weight_shape|codebooks|trellis|W_q|zero_points?|Qidxs|qscale|qtype|q_scales?)$"
    r"|proj\.(?:scale|zero)$|:int_data|:scale|:zero_point"
    r"|quant_state|_packed_params"
    r"|(?:weight|weights|input|output|activation|proj|[qkv])_scales?(?:_inv|_2)?$"
    r"|_scale_inv$|\.scales$|_(?:blocks|scales)$|weight\._(?:data|scale)$"
)


def check_not_quantised(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, int]]
) -> None:
    """Refuse a quantised checkpoint, by its config or by the names and dtypes of its tensors.

    `tensors` has the dtype, as safetensors, torch or NumPy names it, and the number of axes of each.

    Raises:
        ValueError: with the method of quantisation or the tensor.
    """
    how = _method(config)
    if how is None:
        how = next((f"it holds {name}" for name in tensors if COMPANION.search(name)), None)
    if how is None:
        codes = (name for name, (dtype, axes) in tensors.items() if axes and _is_code(name, dtype))
        how = next((f"{name} is of dtype {tensors[name][0]}" for name in codes), None)
    if how is not None:
        raise ValueError(
            f"{where} is quantised ({how}), so its tensors are not its weights: give the checkpoint that"
            " it was made from, in float32, float16 or bfloat16"
        )


def _is_code(name: str, dtype: str) -> bool:
    whole = WHOLE_NUMBERS.fullmatch(dtype) is not None and name.endswith("weight")  # not of positions, masks
    return whole or CODES.fullmatch(dtype) is not None


def _method(config: Mapping[str, Any]) -> str | None:
    """The method that a config names, with the bits; None without one."""
    places = [config, *(config[name] for name in TEXT if isinstance(config.get(name), Mapping))]
    given = next((place[key] for place in places for key in CONFIGS if place.get(key)), None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return "by its config.json"
    bits = given.get("bits") or (4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else None)
    method = given.get("quant_method") or given.get("quant_algo") or "by its config.json"
    return f"{method}, {bits} bits" if bits else str(method)
