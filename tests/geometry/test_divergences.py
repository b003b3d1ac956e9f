import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from weightgeom.geometry.divergences import divergences


def test_the_divergence_of_two_predictions() -> None:
    base, other = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    # 3/4 log(3/2) + 1/4 log(1/2)
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert_close(divergences(base, torch.zeros(1), other)[0], expected[None])


@given(st.floats(1e-7, 10), st.integers(0, 10_000))
def test_it_is_never_negative_and_that_of_torch_in_every_slice_of_tokens(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(300, 11, generator=generator)
    other = base + scale * torch.randn(300, 11, generator=generator)
    kl, normaliser = divergences(base, base.logsumexp(-1), other)
    assert kl.min() >= 0
    assert_close(normaliser, other.logsumexp(-1))
    # In fp64, as fp32 loses the KL of predictions that are nearly equal.
    expected = kl_divergence(Categorical(logits=base.double()), Categorical(logits=other.double()))
    assert_close(kl.double(), expected, rtol=1e-3, atol=1e-9 * scale)
    assert not divergences(base, base.logsumexp(-1), base)[0].any()
