import pytest
import torch
from torch.testing import assert_close

from weightgeom.uncertainty.sensitivity import (
    coupling,
    fisher_sensitivity,
    quadratic_size,
    symmetric_kl,
    token_gradients,
)


@pytest.fixture
def linear(generator):
    """A linear head W, states and a direction, in fp32 as a network's."""
    weight = torch.randn(300, 32, generator=generator) / 2
    states = torch.randn(20, 32, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    return weight, states, direction


def closed_form(weight, states, direction):
    """bᵀ Wᵀ (diag p - p pᵀ) W b, in fp64."""
    p, pushed = (states.double() @ weight.double().T).softmax(1), weight.double() @ direction.double()
    return p @ pushed.square() - (p @ pushed).square()


def test_the_sensitivity_of_a_linear_head_is_its_closed_form_to_1_percent(linear):
    weight, states, direction = linear

    def head(h):
        return h @ weight.T

    size, difference = quadratic_size(head, states, direction, start=0.5)
    assert difference <= 0.05
    sensitivity = fisher_sensitivity(head, states, direction, size / 32)
    expected = closed_form(*linear)
    assert_close(sensitivity.double(), expected, rtol=0.01, atol=0.01 * float(expected.mean()))
    assert abs(float(sensitivity.double().mean() / expected.mean()) - 1) < 0.01


def test_a_size_beyond_the_quadratic_regime_is_halved_until_it_is_quadratic(linear):
    weight, states, direction = linear
    size, difference = quadratic_size(lambda h: h @ weight.T, states, direction, start=8.0)
    assert size < 4 and difference <= 0.05


def test_the_remaining_difference_reveals_that_no_size_was_small_enough(linear):
    weight, states, direction = linear
    _, difference = quadratic_size(lambda h: h @ weight.T, states, direction, start=1e4)
    assert difference > 0.05


def test_the_symmetric_divergence_is_the_sum_of_both_in_fp64(generator):
    logits = torch.randn(8, 50, generator=generator)
    for scale in (1e-3, 1.0, 5.0):
        other = logits + scale * torch.randn(8, 50, generator=generator)
        p, q = logits.double().log_softmax(1), other.double().log_softmax(1)
        expected = ((p.exp() - q.exp()) * (p - q)).sum(1)
        assert_close(symmetric_kl(logits, other).double(), expected, rtol=2e-3, atol=1e-12)


def test_a_constant_added_to_all_logits_gives_zero_divergence(generator):
    logits = torch.randn(8, 50, generator=generator)
    assert float(symmetric_kl(logits, logits + 3).max()) < 1e-10


def test_the_gradient_of_a_linear_heads_tokens_is_the_sum_of_their_rows(linear):
    weight, states, _ = linear
    gradient = token_gradients(lambda h: h @ weight.T, states, [5, 9, 5])
    assert_close(gradient, (weight[5] + weight[9]).expand(20, -1))


def test_coupling_is_the_cosine_and_0_for_a_zero_gradient(linear):
    _, states, direction = linear
    gradients = torch.cat([states[:1], torch.zeros(1, 32)])
    expected = float(states[0] @ direction / states[0].norm())
    couplings = coupling(torch.stack([3 * direction, states[0]]), gradients)
    assert_close(couplings, torch.tensor([[expected, 0.0], [1.0, 0.0]]), rtol=1e-5, atol=1e-6)
