"""Quantised weights: their values from codes and scales, and the spacing of the grid around each value."""

from math import log2

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 128  # rows and columns that share a scale where the config says nothing
SCALE_BIAS = 127  # of the exponents that stand for scales in one byte (OCP microscaling formats)
PART = 2**18  # MXFP4 scales that are looked at together, 32 values each


def fp8_values(
    codes: Float[Tensor, "*stack rows columns"], scale: Shaped[Tensor, "..."], block: tuple[int, int]
) -> Float[Tensor, "*stack rows columns"]:
    """Weights from fp8 codes in float32: code times scale.

    There is one scale for the tensor, for each row or column, or for each block of `block` rows and columns,
    of which the last may be cut off. Other numbers of scales stand for blocks of equal size.
    Source: `Fp8Dequantize` of transformers.

    Raises:
        ValueError: if the scales do not go with the shape.
    """
    return _scaled_(codes.float(), scale, block)


def fp8_spacing(
    codes: Float[Tensor, "*stack rows columns"], scale: Shaped[Tensor, "..."], block: tuple[int, int]
) -> Float[Tensor, "*stack rows columns"]:
    """The distance of neighbouring fp8 values at each weight, in units of the weights.

    Raises:
        ValueError: as `fp8_values` does.
    """
    return _scaled_(spacing(codes.float(), codes.dtype), scale, block)


def mxfp4_values(
    blocks: UInt8[Tensor, "expert rows group byte"], scales: UInt8[Tensor, "expert rows group"]
) -> Float[Tensor, "expert columns rows"]:
    """Weights from MXFP4 blocks in bfloat16, which holds them exactly: code's value times 2^(scale - 127).

    A byte has two codes, the lower half first. Rows become columns, as in the released GPT-OSS.
    Source: `convert_moe_packed_tensors` of transformers; OCP Microscaling Formats (2023), section 5.
    """
    from transformers.integrations.mxfp4 import FP4_VALUES

    return _looked_up(blocks, scales, torch.tensor(FP4_VALUES))


def mxfp4_spacing(
    blocks: UInt8[Tensor, "expert rows group byte"], scales: UInt8[Tensor, "expert rows group"]
) -> Float[Tensor, "expert columns rows"]:
    """The distance of neighbouring MXFP4 values at each weight, in units of the weights."""
    from transformers.integrations.mxfp4 import FP4_VALUES

    power = torch.tensor(FP4_VALUES).abs().clamp(min=1).log2().floor().exp2()
    return _looked_up(blocks, scales, power / 2)  # one bit of mantissa; zero and 0.5 have the step of 1


def spacing(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The distance of neighbouring numbers of a floating-point `dtype` at each value, in float32."""
    limits = torch.finfo(dtype)
    power = torch.frexp(values.float()).exponent - 1  # a value is in [1, 2) · 2^power
    power.masked_fill_(values == 0, -(2**20)).clamp_(min=int(log2(limits.smallest_normal)))
    return torch.exp2(power.float()).mul_(limits.eps)


def _scaled_(
    values: Float[Tensor, "*stack rows columns"], scale: Shaped[Tensor, "..."], block: tuple[int, int]
) -> Float[Tensor, "*stack rows columns"]:
    """Multiplies `values` in place."""
    rows, columns = values.shape[-2:]
    factors = _as_float(scale)
    if factors.numel() == 1:
        return values.mul_(factors.view(()))
    if factors.ndim == 1:
        factors = factors[:, None]
    down, across = factors.shape[-2:]
    if factors.ndim == values.ndim and down in (1, rows) and across in (1, columns):
        return values.mul_(factors)
    high, wide = block
    if (down, across) != (-(-rows // high), -(-columns // wide)):
        high, wide = rows // down, columns // across
    if factors.ndim != values.ndim or high * down < rows or wide * across < columns:
        raise ValueError(
            f"scales of shape {tuple(scale.shape)} do not go with a weight of shape {tuple(values.shape)} in"
            f" blocks of {block[0]} x {block[1]}"
        )
    in_rows = factors.repeat_interleave(high, -2)[..., :rows, :]
    for place in range(across):
        values[..., place * wide : (place + 1) * wide].mul_(in_rows[..., place : place + 1])
    return values


def _as_float(scale: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    if scale.dtype == torch.uint8:  # an exponent
        return torch.exp2(scale.float() - SCALE_BIAS)
    return scale.float()


def _looked_up(
    blocks: UInt8[Tensor, "expert rows group byte"],
    scales: UInt8[Tensor, "expert rows group"],
    table: Float[Tensor, "16"],
) -> Float[Tensor, "expert columns rows"]:
    """The table's values of all codes, times their scales."""
    values = torch.empty(*blocks.shape[:-1], 2 * blocks.shape[-1], dtype=torch.bfloat16)
    parts = (part.flatten(0, 2).split(PART) for part in (blocks, scales[..., None], values))
    for codes, exponents, target in zip(*parts, strict=True):
        factors = torch.exp2(exponents.float() - SCALE_BIAS)
        target[:, 0::2] = table[(codes & 15).int()] * factors
        target[:, 1::2] = table[(codes >> 4).int()] * factors
    return values.flatten(2).transpose(1, 2)
