"""Quantised checkpoints: which of them can be read, and the refusal of all others by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weightgeom.models.codes import BLOCK

CONFIGS = ("quantization_config", "compression_config", "quantization", "quantize_config")
TEXT = ("text_config", "llm_config", "language_config")  # of a model that also sees or hears
CODES = re.compile(  # complex numbers are no weights either: as real ones they lose their imaginary parts
    r"(?:torch\.)?(?:u?int|U|I)(?:1|2|4|8|16|32)|(?:torch\.)?float(?:4|6|8)_\w+|F4|F[468]_\w+"
    r"|C(?:64|128)|(?:torch\.)?complex\d+"
)
WHOLE_NUMBERS = re.compile(r"(?:torch\.)?(?:u?int64|bool)|U64|I64|BOOL")
# Scales, zero points and codes, as bitsandbytes, GPTQ, AWQ, MLX, compressed-tensors, fp8, ModelOpt, MXFP4,
# HQQ, Quanto, torchao, AQLM, QuIP, EETQ and EXL store them next to a weight or in its place.
COMPANION = re.compile(
    r"(?:^|[._])(?:SCB|qweight|qzeros|g_idx|absmax|quant_map|nested_\w+|weight_format|weight_packed"
    r"|weight_shape|codebooks|trellis|W_q|zero_points?|Qidxs|qscale|qtype|q_scales?)$"
    r"|proj\.(?:scale|zero)$|:int_data|:scale|:zero_point"
    r"|quant_state|_packed_params"
    r"|(?:weight|weights|input|output|activation|proj|[qkv])_scales?(?:_inv|_2)?$"
    r"|_scale_inv$|\.scales$|_(?:blocks|scales)$|weight\._(?:data|scale)$"
)
# Methods whose rule transformers has, and the formats of compressed-tensors with one fp8 code a weight.
READABLE = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")
ONE_CODE_EACH = ("float-quantized", "naive-quantized")
FP8 = ("F8_E4M3", "F8_E5M2")
# Of the inputs of a layer and of the attention's cache, which are no part of a weight.
OF_ACTIVATIONS = re.compile(
    r"(?:^|[._])(?:input_scale|input_scale_ub|activation_scale|qscale_act|[kv]_scale)$"
)


@dataclass(frozen=True)
class Codes:
    """A quantised weight: the names of the tensors of its codes and scales, and its rule.

    `block` has the rows and columns of the blocks that share a scale.
    """

    codes: str
    scale: str
    rule: Literal["fp8", "mxfp4", "converted"]
    block: tuple[int, int]


def codes_among(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, int]]) -> dict[str, Codes]:
    """The quantised weights that can be read, by the names of the weights; none without a config's method.

    `tensors` is as in `check_not_quantised`, named as safetensors does.
    """
    given = _given(config)
    if not _is_readable(given):
        return {}
    assert isinstance(given, Mapping)
    high, wide = given.get("weight_block_size") or (BLOCK, BLOCK)
    sizes = (int(high), int(wide))
    codes: dict[str, Codes] = {}
    for name, (dtype, _) in tensors.items():
        stem = name.removesuffix("_blocks")
        if dtype == "U8" and stem != name and f"{stem}_scales" in tensors:
            codes[stem] = Codes(name, f"{stem}_scales", "mxfp4", sizes)
        elif dtype in FP8 and (scale := next(filter(tensors.__contains__, _scales(name)), None)):
            codes[name] = Codes(name, scale, "fp8", sizes)
    return codes


def is_of_activations(name: str) -> bool:
    """Whether a stored tensor scales activations, not weights."""
    return OF_ACTIVATIONS.search(name) is not None


def check_not_quantised(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, int]]
) -> None:
    """Refuse a quantised checkpoint, by its config or by the names and dtypes of its tensors.

    `tensors` has the dtype, as safetensors, torch or NumPy names it, and the number of axes of each, without
    the codes and scales of weights that can be read.

    Raises:
        ValueError: with the method of quantisation or the tensor.
    """
    given = _given(config)
    how = None if given is None or _is_readable(given) else _in_words(given)
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


def _given(config: Mapping[str, Any]) -> object:
    """The entry of a config about quantisation; None without one."""
    places = [config, *(config[name] for name in TEXT if isinstance(config.get(name), Mapping))]
    return next((place[key] for place in places for key in CONFIGS if place.get(key)), None)


def _is_readable(given: object) -> bool:
    if not isinstance(given, Mapping) or given.get("quant_method") not in READABLE:
        return False
    if block := given.get("weight_block_size"):
        sizes = block if isinstance(block, list) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            return False
    transform = given.get("transform_config") or {}
    rotated = not isinstance(transform, Mapping) or bool(transform.get("config_groups"))
    return given["quant_method"] != "compressed-tensors" or (
        given.get("format") in ONE_CODE_EACH and not rotated
    )


def _in_words(given: object) -> str:
    """The method, with the bits."""
    if not isinstance(given, Mapping):
        return "by its config.json"
    bits = given.get("bits") or (4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else None)
    method = given.get("quant_method") or given.get("quant_algo") or "by its config.json"
    return f"{method}, {bits} bits" if bits else str(method)


def _scales(name: str) -> list[str]:
    """The names that the scale of a weight may have."""
    usual = [f"{name}_scale_inv", f"{name}_scale"]
    module = name.removesuffix(".weight")
    return usual if module == name else [*usual, f"{module}.qscale_weight", f"{module}.scale"]
