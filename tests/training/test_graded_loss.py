"""The graded loss by hand, against torch's own losses, and what sampled negatives estimate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, logsigmoid
from torch.testing import assert_close

from weightgeom.training.graded_loss import (
    Contrasted,
    Draws,
    TokenContrast,
    graded_loss,
    graded_target,
    score_gradient,
)

DOUBLE = torch.float64
V = 40


def graded(grades, tau):
    return graded_target(torch.tensor(grades, dtype=DOUBLE), tau).tolist()


def test_the_loss_of_three_candidates_by_hand():
    # q ∝ (e, 1, 1) at tau = 1; p ∝ (1, 2, 1), as log 2 is a score of the second
    scores = torch.tensor([0, math.log(2), 0], dtype=DOUBLE)
    loss = graded_loss(scores, torch.tensor([1, 0, 0], dtype=DOUBLE), 1.0)
    expected = (math.e * math.log(4) + math.log(2) + math.log(4)) / (math.e + 2)
    assert_close(float(loss), expected, rtol=1e-12, atol=1e-14)


def test_tau_goes_from_one_hot_to_uniform_without_a_jump():
    assert graded([1.0, 0, 0], 0.0) == [1, 0, 0]
    assert graded([1.0, 0, 0], 1e-320) == graded([1.0, 0, 0], 1e-3) == [1, 0, 0]
    assert graded([1.0, 0, 0], math.inf) == pytest.approx([1 / 3] * 3, rel=1e-15)
    assert graded([1.0, 0, 0], 1e9) == pytest.approx([1 / 3] * 3, rel=1e-8)
    assert graded([1.0, 0], 2.0)[1] == pytest.approx(1 / (1 + math.exp(1 / 2)), rel=1e-15)


def test_candidates_of_one_grade_share_the_target():
    assert graded([1.0, 0, 1], 0.0) == [0.5, 0, 0.5]
    assert graded([0.0, 0], 0.0) == graded([0.0, 0], 3.0) == [0.5, 0.5]


@given(st.floats(0.01, 100), st.integers(2, 60))
def test_over_a_vocabulary_it_is_torchs_label_smoothed_cross_entropy(tau, size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(5, size, dtype=DOUBLE, generator=generator, requires_grad=True)
    targets = torch.randint(size, (5,), generator=generator)
    # q_other = 1 / (e^{1/tau} + V - 1) is smoothing / V
    smoothing = size / (math.exp(1 / tau) + size - 1)
    ours, _ = TokenContrast(tau, size - 1, "uniform", 0).losses(logits, targets, draws(5))
    theirs = cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    assert_close(*gradients, rtol=1e-10, atol=1e-13)


@given(st.floats(-20, 20), st.sampled_from([0.0, 0.3, 1.0, 5.0, math.inf]))
def test_over_a_pair_it_is_the_smoothed_logistic_loss(margin, tau):
    smoothing = {0.0: 0.0, math.inf: 0.5}.get(tau, 1 / (1 + math.exp(1 / (tau or 1))))
    delta = torch.tensor(margin, dtype=DOUBLE)
    ours = graded_loss(torch.stack([delta, 0 * delta]), torch.tensor([1, 0], dtype=DOUBLE), tau)
    theirs = -(1 - smoothing) * logsigmoid(delta) - smoothing * logsigmoid(-delta)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", [0.0, 0.7, math.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_closed_form_of_the_gradient_is_autograds(tau, weighted, generator):
    scores = torch.randn(4, 6, dtype=DOUBLE, generator=generator, requires_grad=True)
    grades = torch.zeros(4, 6, dtype=DOUBLE)
    grades[:, 2] = 1
    weights = torch.rand(4, 6, dtype=DOUBLE, generator=generator) if weighted else None
    graded_loss(scores, grades, tau, weights).sum().backward()
    assert_close(scores.grad, score_gradient(scores, grades, tau, weights).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", [0.0, 0.7, math.inf])
def test_a_candidate_of_weight_n_is_n_candidates(tau):
    scores, grades = torch.tensor([0.3, -1.0, 2.0], dtype=DOUBLE), torch.tensor([1.0, 0, 0], dtype=DOUBLE)
    weights = torch.tensor([1.0, 3.0, 2.0], dtype=DOUBLE)
    times = weights.long()
    whole = graded_loss(scores.repeat_interleave(times), grades.repeat_interleave(times), tau)
    assert_close(graded_loss(scores, grades, tau, weights.log()), whole, rtol=1e-12, atol=1e-14)


def draws(tokens: int, step: int = 0) -> Draws:
    """One sequence with that many targets."""
    labels = torch.arange(tokens + 1)[None]
    return Draws(step, labels, labels)


def contrast(negatives, source, tau=0.0, seed=0) -> TokenContrast:
    frequent = torch.arange(V, 2 * V).log() if source == "unigram" else None
    return TokenContrast(tau, negatives, source, seed, frequent)


def drawn(contrast: TokenContrast, logits, targets, source=None):
    return contrast.losses(logits, targets, source or draws(len(targets)))[1]


def weights(contrasted: Contrasted) -> torch.Tensor:
    assert contrasted.log_weights is not None
    return contrasted.log_weights


@pytest.mark.parametrize("source", ["uniform", "unigram"])
@pytest.mark.parametrize("negatives", [1, 4, V // 2, V - 2])
def test_negatives_are_drawn_without_replacement_and_are_not_the_target(source, negatives, generator):
    # A candidate's score names it: all logits differ.
    logits = torch.arange(V, dtype=DOUBLE).repeat(1000, 1)
    targets = torch.randint(V, (1000,), generator=generator)
    contrasted = drawn(contrast(negatives, source), logits, targets)
    assert contrasted.scores[:, 0].tolist() == targets.tolist() and not contrasted.target.any()
    assert all(len(set(row)) == negatives + 1 for row in contrasted.scores.tolist())
    assert bool((weights(contrasted)[:, 1:] >= 0).all()) and not weights(contrasted)[:, 0].any()
    assert contrasted.scores[:, 1:].unique().numel() == V  # each token is drawn sometimes


def test_the_models_own_negatives_are_its_best_other_tokens():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1.0]], dtype=DOUBLE)
    contrasted = drawn(contrast(2, "model"), logits, torch.tensor([1]))
    assert contrasted.scores.tolist() == [[3.0, 2.0, 1.0]] and not weights(contrasted).any()


@pytest.mark.parametrize("source", ["uniform", "unigram"])
@pytest.mark.parametrize("negatives", [2, V // 2, V - 2])
def test_the_estimate_of_the_normaliser_is_unbiased(source, negatives, generator):
    n = 20_000
    logits = torch.randn(V, dtype=DOUBLE, generator=generator)
    contrasted = drawn(contrast(negatives, source), logits.repeat(n, 1), torch.full((n,), 3))
    estimates = (contrasted.scores + weights(contrasted)).exp().sum(1)
    error = estimates.mean() - logits.exp().sum()
    # The mean of n draws, within five of its standard errors.
    assert abs(error) < 5 * estimates.std() / n**0.5
    counts = weights(contrasted).exp().sum(1) - 1  # how many tokens the others stand for
    assert abs(counts.mean() - (V - 1)) <= 5 * counts.std() / n**0.5 + 1e-9


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize("source", ["uniform", "unigram"])
def test_with_half_the_vocabulary_the_expected_gradient_is_that_of_the_full_softmax(source, tau, generator):
    n = 10_000
    logits = torch.randn(V, dtype=DOUBLE, generator=generator) / 3
    rows = logits.repeat(n, 1).requires_grad_()
    targets = torch.full((n,), 3)
    losses, contrasted = contrast(V // 2, source, tau).losses(rows, targets, draws(n))
    (gradients,) = torch.autograd.grad(losses.sum(), rows)
    whole = logits[None].clone().requires_grad_()
    loss, _ = contrast(V - 1, source, tau).losses(whole, targets[:1], draws(1))
    (expected,) = torch.autograd.grad(loss.sum(), whole)
    error = gradients.mean(0) - expected[0]
    noise = (gradients.var(0).sum() / n).sqrt()
    estimates = (contrasted.scores.detach() + weights(contrasted)).exp().sum(1)
    variation = float(estimates.var() / estimates.mean() ** 2)  # 0.002 (uniform), 0.02 (unigram)
    # The norm of V entries of noise is `noise` with a relative sd below 1/2; the bias is below half of
    # `variation` times the gradient's norm, 1. Without weights the target's entry alone is 0.03 off.
    bound = 3 * noise + variation / 2
    assert error.norm() < bound < 0.02
    plain = score_gradient(contrasted.scores.detach(), contrasted.grades, tau)[:, 0].mean()
    assert abs(plain - expected[0, 3]) > bound or tau


@pytest.mark.parametrize("negatives", [5, V // 2])
def test_the_gradient_is_off_by_p_times_the_relative_variance_of_the_normaliser_at_the_target(
    negatives, generator
):
    n = 40_000
    logits = torch.randn(V, dtype=DOUBLE, generator=generator)
    p = logits.softmax(0)[3]
    contrasted = drawn(contrast(negatives, "uniform"), logits.repeat(n, 1), torch.full((n,), 3))
    estimates = (contrasted.scores + weights(contrasted)).exp().sum(1)
    gradients = score_gradient(contrasted.scores, contrasted.grades, 0.0, contrasted.log_weights)[:, 0]
    error, noise = gradients.mean() - (p - 1), gradients.std() / n**0.5
    bias = p * estimates.var() / estimates.mean() ** 2
    # E[1 / Z] = (1 + var(Z) / Z²) / Z to leading order; the next term is some tenths of it.
    assert bias > 10 * noise
    assert abs(error - bias) < 5 * noise + 0.3 * bias


@pytest.mark.parametrize("source", ["uniform", "unigram"])
@pytest.mark.parametrize("negatives", [V // 2, V - 6])
def test_the_loss_is_too_low_by_half_the_relative_variance_of_the_normaliser(source, negatives, generator):
    n = 100_000
    logits = torch.randn(V, dtype=DOUBLE, generator=generator) / 3
    losses, contrasted = contrast(negatives, source).losses(
        logits.repeat(n, 1), torch.full((n,), 3), draws(n)
    )
    exact = cross_entropy(logits[None], torch.tensor([3]))
    estimates = (contrasted.scores + weights(contrasted)).exp().sum(1)
    bias = -estimates.var() / 2 / logits.exp().sum() ** 2
    error, noise = losses.mean() - exact, losses.std() / n**0.5
    assert error < 0 and abs(bias) > 3 * noise
    # To leading order; the next term is of the third moment, some tenths of it here.
    assert abs(error - bias) < 5 * noise + 0.3 * abs(bias)


def test_all_negatives_are_the_full_softmax_without_a_draw(generator):
    logits = torch.randn(3, V, dtype=DOUBLE, generator=generator)
    targets = torch.tensor([0, 7, V - 1])
    losses, contrasted = contrast(V - 1, "uniform").losses(logits, targets, draws(0))  # none to be had
    assert contrasted.scores is logits and contrasted.target is targets and contrasted.log_weights is None
    assert_close(losses, cross_entropy(logits, targets, reduction="none"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("source", ["uniform", "unigram"])
def test_a_draw_depends_on_seed_step_and_sequence_and_on_nothing_else(source, generator):
    ids = torch.randint(V, (3, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, :2] = labels[2, 7:] = -100
    logits = torch.randn(3, 9, V, generator=generator)

    def scores(rows, step=2, seed=0, padding=0):
        padded = torch.nn.functional.pad(ids[rows], (0, padding))
        marked = torch.nn.functional.pad(labels[rows], (0, padding), value=-100)
        mask = labels[rows][:, 1:] != -100
        predicted, targets = logits[rows][:, :-1][mask], labels[rows][:, 1:][mask]
        return drawn(contrast(5, source, seed=seed), predicted, targets, Draws(step, padded, marked)).scores

    whole = scores([0, 1, 2])
    assert_close(whole, torch.cat([scores([0]), scores([1, 2])]), rtol=0, atol=0)
    assert_close(whole[:5], scores([2, 0])[-5:], rtol=0, atol=0)
    assert_close(whole, scores([0, 1, 2], padding=3), rtol=0, atol=0)
    for other in (scores([0, 1, 2], step=3), scores([0, 1, 2], seed=1)):
        assert not torch.equal(whole, other)


def test_a_sequence_without_targets_draws_nothing_and_takes_no_others_part(generator):
    logits = torch.randn(2, V, generator=generator)
    ids, labels = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[-100, 2], [3, -100], [-100, 6]])
    contrasted = drawn(contrast(3, "uniform"), logits, torch.tensor([2, 6]), Draws(0, ids, labels))
    assert contrasted.scores.shape == (2, 4)
