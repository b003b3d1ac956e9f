import logging

import pytest
import torch

from weightgeom.estimators.updates import rounding_energy, update_of, warn_of_rounding
from weightgeom.models.residual import ResidualMatrix
from weightgeom.table import row

MATRIX = ResidualMatrix(0, "q", "q")
D = 128


def pair(generator, size: float, dtype: torch.dtype) -> tuple[dict, dict, torch.Tensor]:
    """A matrix before and after an update of that size, both rounded, and the update."""
    before = torch.randn(D, D, generator=generator)
    delta = size * torch.randn(D, D, generator=generator)
    return {"q.weight": (before + delta).to(dtype)}, {"q.weight": before.to(dtype)}, delta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_share_is_that_of_the_error_that_rounding_made(generator, dtype):
    after, before, delta = pair(generator, 8 * torch.finfo(dtype).eps, dtype)
    measured = after["q.weight"].float() - before["q.weight"].float()
    error = float((measured - delta).square().sum() / measured.square().sum())
    # of 16384 squared errors, each of relative sd 0.9 and of sizes that differ: three sd are below 5 %
    assert update_of(MATRIX, after, before).rounding_share == pytest.approx(error, rel=0.05)


def test_one_ulp_of_rounding_by_hand():
    # The ulp of bfloat16 in [1, 2) is 2⁻⁷, in [4, 8) 2⁻⁵; the gain of 3 counts squared
    weight = torch.tensor([[1.5, 0.0], [-4.0, 7.0]]).bfloat16()
    by_hand = (2.0**-14 + 2 * 9 * 2.0**-10) / 12
    assert rounding_energy(weight, torch.tensor([[1.0], [3.0]])) == pytest.approx(by_hand, rel=1e-6)
    assert rounding_energy(weight.float()) == 0


def test_fp32_checkpoints_have_no_rounding_share_and_equal_ones_none_of_it(generator):
    after, before, _ = pair(generator, 0.1, torch.float32)
    assert update_of(MATRIX, after, before).rounding_share is None
    half = {"q.weight": before["q.weight"].bfloat16()}
    assert update_of(MATRIX, half, half).rounding_share == 0


def test_an_update_below_the_precision_is_a_warning(generator, caplog):
    after, before, _ = pair(generator, 1e-4, torch.bfloat16)
    update = update_of(MATRIX, after, before)
    assert update.moved_share < 0.1
    share = update.rounding_share
    assert share is not None and share > 0.9
    with caplog.at_level(logging.WARNING):
        warn_of_rounding([row("rounding_share", 0.4, n=1)])
        assert not caplog.text
        warn_of_rounding([row("rounding_share", share, n=1), row("rounding_share", 0.1, n=1)])
    assert "1 of 2 updates are mostly rounding (rounding_share over 0.5)" in caplog.text
