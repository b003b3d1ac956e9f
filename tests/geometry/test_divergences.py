import pytest
import torch
from torch.testing import assert_close

from weightgeom.geometry.divergences import divergences


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("common", [0.0, 3.0])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 30.0, 300.0])
def test_divergences_are_those_of_the_definition_in_fp64(dtype, common, scale, generator):
    base = (3 * torch.randn(600, 200, generator=generator)).to(dtype)
    other = base + common + scale * torch.randn(600, 200, generator=generator).to(dtype)
    divergence, normaliser = divergences(base, base.logsumexp(-1), other)
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    # Logits of order 10 are themselves good to 5e-7 in fp32 and p to 1e-6, so that a difference of 1e-4,
    # with the offset taken off, has E d²/2 to two per cent; larger ones are as good as p.
    tolerance = {torch.float32: 0.02 if scale < 1e-3 else 1e-3, torch.float64: 1e-6}[dtype]
    assert_close(divergence.double(), expected, rtol=tolerance, atol=1e-14)
    assert (divergence >= 0).all()
    epsilon = torch.finfo(dtype).eps
    assert_close(normaliser.double(), other.double().logsumexp(-1), rtol=8 * epsilon, atol=32 * epsilon)


def test_the_divergence_of_equal_predictions_is_0_and_never_negative(generator):
    base = 10 * torch.randn(600, 200, generator=generator)
    assert not divergences(base, base.logsumexp(-1), base)[0].any()
    for scale in (1e-7, 1e-6, 1e-5):
        other = base + scale * torch.randn(600, 200, generator=generator)
        assert (divergences(base, base.logsumexp(-1), other)[0] >= 0).all()


def test_the_divergence_of_two_predictions():
    base, other = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    # 3/4 log(3/2) + 1/4 log(1/2), and the other's probabilities sum to 1
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    divergence, normaliser = divergences(base, base.logsumexp(-1), other)
    assert_close(divergence[0], expected)
    assert_close(normaliser[0], torch.tensor(0.0))
