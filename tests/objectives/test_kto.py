import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import TRAINING, curves, trainer_for
from torch.testing import assert_close

from weightgeom.estimators.gradients import Gathering, gradient_moments, sampled
from weightgeom.objectives.kto import KTO
from weightgeom.text.tokens import Batch
from weightgeom.training.fit import outdated_name_allowed


def moved(trainer, scale) -> Any:
    """The trainer with its policy some way from its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    return trainer


def loss_of(trainer, inputs) -> Any:
    with outdated_name_allowed():
        return trainer.compute_loss(trainer.model, inputs)


def log_ratios(trainer, model, inputs, prefix=""):
    """Policy against reference, by this repository's own log-probabilities."""
    batch = Batch(
        inputs[f"{prefix}input_ids"],
        inputs[f"{prefix}attention_mask"],
        inputs[f"{prefix}completion_mask"].bool(),
    )
    policy, reference = (
        model.log_probs(dict(network.named_parameters()), batch).sum(1)
        for network in (trainer.model, trainer.ref_model)
    )
    return policy - reference


@pytest.mark.slow
def test_the_first_loss_is_half_the_weight_and_the_last_ones_are_lower(tmp_path, model, examples):
    # 1 - σ(0) = 1/2, times 3
    tripled = KTO(desirable_weight=3.0, undesirable_weight=3.0)
    longer = replace(TRAINING, steps=24, learning_rate=1e-2)
    by_step = curves(tripled, model, examples, tmp_path, longer)
    assert tripled.first_loss == 1.5 and KTO(desirable_weight=2.0).first_loss is None
    assert by_step[1]["loss"] == pytest.approx(1.5, abs=1e-6)
    assert sum(by_step[step]["loss"] for step in range(19, 25)) / 6 < 1.4  # the six batches of an epoch
    assert by_step[1]["kl"] == 0 and "rewards/margins" in by_step[1] and "participation_ratio" in by_step[1]


# One step to either side of the reference: the log-ratios are negative on one, where z is clamped to 0.
@pytest.mark.parametrize("scale", [0.003, -0.003])
def test_the_loss_is_that_of_the_paper_on_our_log_probs(scale, tmp_path, model, examples):
    objective = KTO(beta=0.3, desirable_weight=2.0, undesirable_weight=0.5)
    trainer = moved(trainer_for(objective, model, examples, tmp_path), scale)
    values = []
    for inputs in trainer.get_train_dataloader():
        z = log_ratios(trainer, model, inputs, "KL_").mean().clamp(min=0)
        sign = inputs["label"].float() * 2 - 1
        weight = torch.where(inputs["label"], 2.0, 0.5)
        losses = weight * (1 - torch.sigmoid(sign * 0.3 * (log_ratios(trainer, model, inputs) - z)))
        assert_close(loss_of(trainer, inputs), losses.mean(), rtol=1e-4, atol=1e-5)
        with outdated_name_allowed():
            assert_close(objective.total_loss(trainer, inputs), losses.sum(), rtol=1e-4, atol=1e-4)
        values.append(float(z))
    assert len(values) == 6 and (max(values) > 0.01) == (scale < 0)


def test_every_response_is_there_once_by_its_kind_in_an_order_that_the_seed_draws(tmp_path, model, examples):
    first, again, other = (
        trainer_for(KTO(), model, examples, tmp_path, seed=seed).train_dataset for seed in (0, 0, 1)
    )
    assert first["completion"] == again["completion"] != other["completion"]
    end = model.tokenizer.eos_token
    responses = {
        (prompt, completion.removesuffix(end), label)
        for prompt, completion, label in zip(
            first["prompt"], first["completion"], first["label"], strict=True
        )
    }
    assert len(first) == 2 * len(examples.pairs)
    assert responses == {
        (pair.prompt, response, response == pair.chosen)
        for pair in examples.pairs
        for response in (pair.chosen, pair.rejected)
    }
    # Were all the chosen ones first, as TRL would have them, no batch would have both.
    (inputs, *_) = trainer_for(KTO(), model, examples, tmp_path).get_train_dataloader()
    assert 0 < int(inputs["label"].sum()) < 8


def test_the_gathered_gradient_is_that_of_the_trainers_mean_loss(model, examples, tmp_path):
    params = {name: weight.clone() for name, weight in model.network.named_parameters()}
    gathering = Gathering(prompts=12, batch_size=4)
    (gathered_pass,) = gradient_moments(model, params, KTO(), TRAINING, examples, gathering, seed=0)
    network = model.with_weights(params).requires_grad_(False).eval()
    kept = sampled(examples, 12, TRAINING.max_length, 0)
    arguments = TRAINING.arguments(tmp_path, 0, "cpu") | {"per_device_eval_batch_size": 12}
    trainer: Any = KTO().trainer(network, model.tokenizer, kept, arguments)
    (inputs,) = trainer.get_eval_dataloader(trainer.train_dataset.shuffle(seed=0).select(range(12)))
    network.requires_grad_(True)
    scored = KTO().scored(inputs)
    assert scored.prompt == list(range(12)) and scored.terms == [1] * 12 and gathered_pass.prompts == 12
    loss_of(trainer, inputs).backward()
    for name, gradient in gathered_pass.gradients.items():
        expected = network.get_parameter(name).grad
        assert expected is not None
        assert_close(gradient.value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_log_says_what_was_cut_and_too_long_prompts_are_refused(model, examples, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer_for(KTO(), model, examples, tmp_path, replace(TRAINING, max_length=16))
    count = 2 * len(examples.pairs)
    assert f"{count} responses: 0 dropped (prompt of 16 tokens or more)" in caplog.text
    with pytest.raises(ValueError, match=r"every prompt is 3 tokens or longer: raise training\.max_length"):
        trainer_for(KTO(), model, examples, tmp_path, replace(TRAINING, max_length=3))


def test_data_without_pairs_and_batches_of_one_are_refused(model, examples, tmp_path):
    with pytest.raises(ValueError, match="objective=kto needs preference pairs, but world-style has none"):
        KTO().check(replace(examples, pairs=[]))
    with pytest.raises(ValueError, match=r"training\.batch_size must be at least 2 for .*, got 1"):
        trainer_for(KTO(), model, examples, tmp_path, replace(TRAINING, batch_size=1))


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": -1.0}])
def test_values_out_of_range_are_refused_when_the_objective_is_described(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KTO(**wrong)
