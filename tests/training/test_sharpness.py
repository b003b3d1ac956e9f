"""Participation ratios and target energies by hand, and logged with the loss of TRL's trainers."""

import pytest
import small
import torch
from torch.testing import assert_close

from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed
from weightgeom.training.sharpness import (
    MAX_TOKENS,
    Sharpness,
    alternatives,
    evenly_spaced,
    log_prob_gradient,
    participation_ratio,
    sharpness,
    sharpness_means,
    sharpness_sums,
    target_energy,
)

NAMES = {"participation_ratio", "target_energy"}


def test_one_entry_has_a_ratio_of_1_and_equal_ones_their_number():
    gradient = torch.tensor([[0.0, -3, 0, 0], [1, -1, 1, 1], [2, -1, -1, 0]])
    # (4 + 1 + 1)² / (16 + 1 + 1) = 2
    assert participation_ratio(gradient).tolist() == [1, 4, 2]
    assert_close(target_energy(gradient, torch.tensor([1, 0, 0])), torch.tensor([1, 1 / 4, 4 / 6]))


def test_a_tiny_gradient_is_as_sharp_as_a_large_one():
    gradient = torch.tensor([[2.0, -1, -1]]) * 1e-30
    assert participation_ratio(gradient).tolist() == pytest.approx([2])


def test_the_gradient_is_autograds_of_a_loss_of_log_probabilities(generator):
    logits = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    coefficient = torch.randn(5, dtype=torch.float64, generator=generator)
    log_probs = torch.log_softmax(logits, 1)[torch.arange(5), targets]
    (coefficient @ log_probs).backward()
    assert_close(logits.grad, log_prob_gradient(logits.detach(), targets, coefficient))


def test_tokens_without_a_gradient_do_not_count():
    logits = torch.zeros(2, 3, dtype=torch.float64)
    targets = torch.tensor([0, 1])
    # p is 1/3: the gradient ∝ (2, -1, -1), (4 + 1 + 1)² / (16 + 1 + 1) = 2 and 4/6
    quantities = sharpness(logits, targets, torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert quantities == pytest.approx({"participation_ratio": 2, "target_energy": 2 / 3, "alternatives": 2})
    assert sharpness(logits, targets, torch.zeros(2, dtype=torch.float64)) == {}


def test_alternatives_are_the_candidates_that_the_target_is_contrasted_with():
    gradient = torch.tensor([[-1.0, 1.0, 0.0, 0.0], [-3.0, 1.0, 1.0, 1.0], [2.0, -2.0, 0.0, 1.0]])
    # a pair; three equal ones; one, as a candidate of the target's own sign is no alternative
    assert alternatives(gradient, torch.tensor([0, 0, 0])).tolist() == pytest.approx([1, 3, 1])
    assert alternatives(1e-30 * gradient[:1], torch.tensor([0])).tolist() == [1]
    assert alternatives(torch.zeros(1, 4), torch.tensor([0])).tolist() == [0]
    uneven = torch.tensor([[-1.0, 0.75, 0.25]])
    assert alternatives(uneven, torch.tensor([0])).tolist() == pytest.approx([1 / (0.75**2 + 0.25**2)])


def test_a_loss_of_pairs_says_itself_how_many_responses_it_contrasts():
    gradient, targets = torch.tensor([[-1.0, 0.5, 0.5]]), torch.tensor([0])
    assert sharpness_means(sharpness_sums(gradient, targets, 1.0))["alternatives"] == 1
    assert "alternatives" not in sharpness_means(sharpness_sums(gradient, targets, float("nan")))


def test_of_many_tokens_some_are_looked_at_from_first_to_last():
    assert evenly_spaced(3) == [0, 1, 2]
    many = evenly_spaced(10 * MAX_TOKENS + 7)
    assert (
        len(set(many)) == MAX_TOKENS
        and many[0] == 0
        and 10 * MAX_TOKENS - 10 < many[-1] < 10 * MAX_TOKENS + 7
    )


@pytest.mark.parametrize("objective", [CE("text"), CE("chosen"), DPO()], ids=["text", "chosen", "dpo"])
def test_sharpness_is_logged_with_the_loss_and_does_not_change_the_training(objective, tmp_path):
    examples, tokenizer = small.WORLD.examples(), small.WORLD.tokenizer()
    arguments = Training(steps=3, batch_size=4, max_length=48, log_every=2).arguments(tmp_path, 0, "cpu")
    logs = {}
    for measured in (False, True):
        network = small.network(tokenizer)
        network.config.hidden_dropout = network.config.attention_dropout = 0.1
        trainer = objective.trainer(type(network)(network.config), tokenizer, examples, arguments)
        trainer.model.load_state_dict(network.state_dict())
        if not measured:
            assert trainer.pop_callback(Sharpness) is not None
        with outdated_name_allowed():
            trainer.train()
        assert trainer.model.training
        logs[measured] = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["loss"] for log in logs[True]] == [log["loss"] for log in logs[False]]
    assert [log["step"] for log in logs[True]] == [1, 2]
    for log in logs[True]:
        assert NAMES <= log.keys() and 1 <= log["participation_ratio"] < 150
        assert 0 < log["target_energy"] < 1
    assert not NAMES & logs[False][0].keys()
