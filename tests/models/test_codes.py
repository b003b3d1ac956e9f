"""Codes and scales of quantised weights, against transformers' own conversion and by hand."""

import pytest
import torch
from torch.testing import assert_close
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from weightgeom.models.codes import fp8_spacing, fp8_values, mxfp4_spacing, mxfp4_values, spacing


def codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("grid", [(3, 2), (12, 1), (1, 1)])
def test_fp8_values_are_those_of_transformers(generator, grid):
    stored, scale = codes(generator, 12, 32), torch.rand(grid, generator=generator)
    expected = Fp8Dequantize(None)._dequantize_one(stored, scale, torch.float32)
    assert_close(fp8_values(stored, scale, (4, 16)), expected, rtol=0, atol=0)


def test_one_scale_may_be_a_number_and_one_of_each_row_a_vector(generator):
    stored = codes(generator, 3, 4)
    assert_close(fp8_values(stored, torch.tensor(0.5), (128, 128)), 0.5 * stored.float())
    rows = torch.tensor([1.0, 2.0, 4.0])
    assert_close(fp8_values(stored, rows, (128, 128)), rows[:, None] * stored.float())


def test_exponents_in_a_byte_are_scales():
    stored = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    assert fp8_values(stored, torch.tensor([[125]], dtype=torch.uint8), (1, 2)).tolist() == [[0.25, 0.5]]


def test_the_last_block_may_be_cut_off_and_experts_have_blocks_of_their_own():
    # 2 experts of 3 rows in blocks of 2: scales 1, 2 and 4, 8, so rows of 1 1 2 and 4 4 8
    stored = torch.ones(2, 3, 5).to(torch.float8_e4m3fn)
    scale = torch.tensor([[[1.0], [2.0]], [[4.0], [8.0]]]).expand(2, 2, 2).contiguous()
    expected = torch.tensor([[1.0, 1.0, 2.0], [4.0, 4.0, 8.0]])[..., None].expand(2, 3, 5)
    assert_close(fp8_values(stored, scale, (2, 4)), expected.contiguous())


def test_scales_that_do_not_go_with_the_weight_are_refused(generator):
    with pytest.raises(
        ValueError, match=r"scales of shape \(5, 1\) do not go with a weight of shape \(12, 32\)"
    ):
        fp8_values(codes(generator, 12, 32), torch.ones(5, 1), (4, 16))


def test_mxfp4_values_are_those_of_transformers(generator):
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    assert_close(mxfp4_values(blocks, scales), convert_moe_packed_tensors(blocks, scales), rtol=0, atol=0)


def test_the_spacing_of_a_dtype_is_the_distance_to_the_next_number():
    for dtype, first_nan in ((torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0x7C)):
        numbers = torch.arange(first_nan, dtype=torch.uint8).view(dtype)
        apart = numbers.float().diff()
        assert_close(spacing(numbers.float(), dtype)[:-1], apart, rtol=0, atol=0)
    # one bit of mantissa, scale 2^1: 0 .5 1 1.5 2 3 4 6 are 1 1 1 1 2 2 4 (and again 4) apart, times 2/2
    blocks = torch.tensor([[[[0x10, 0x32, 0x54, 0x76]]]], dtype=torch.uint8)
    scales = torch.tensor([[[128]]], dtype=torch.uint8)
    assert mxfp4_spacing(blocks, scales).flatten().tolist() == [1, 1, 1, 1, 2, 2, 4, 4]
    assert mxfp4_values(blocks, scales).flatten().tolist() == [0, 1, 2, 3, 4, 6, 8, 12]


def test_spacings_are_scaled_as_the_values_are(generator):
    stored, scale = codes(generator, 4, 4), torch.tensor([[2.0], [4.0]])
    rows = torch.tensor([2.0, 2.0, 4.0, 4.0])[:, None]
    assert_close(fp8_spacing(stored, scale, (2, 4)), rows * spacing(stored.float(), stored.dtype))
