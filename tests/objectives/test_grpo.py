from dataclasses import replace
from typing import Any

import pytest
import torch
from small import TRAINING, Curves, curves, network, trainer_for

from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.objectives.grpo import GRPO, own_words_reward
from weightgeom.training.fit import fit

SMALL = GRPO(generations=4, completion=8)


def test_the_reward_is_the_share_of_own_words_of_either_response() -> None:
    chosen, rejected = "perhaps , ann lives at x .", "we know that , ann lives at y ."
    completions = ["perhaps ann", "perhaps x", "we know that y", "perhaps x we know", "ann lives at z"]
    # own words: {perhaps, x} against {we, know, that, y}
    expected = [1 / 2, 1, -1, 1 - 2 / 4, 0]
    assert own_words_reward(completions, [chosen] * 5, [rejected] * 5, prompts=[]) == expected
    assert own_words_reward(["a b"], ["a"], ["a b"]) == [-1]  # a response without own words adds nothing


@pytest.mark.slow
def test_training_raises_the_reward_and_saves_checkpoints(tmp_path, model, examples) -> None:
    longer = replace(TRAINING, steps=40, learning_rate=1e-2, batch_size=32)
    by_step = curves(SMALL, model, examples, tmp_path, longer)
    rewards = [by_step[step]["reward"] for step in range(1, 41)]
    # A random policy over some 200 words has almost none of a dozen own words.
    assert sum(rewards[:5]) / 5 < 0.05 < sum(rewards[-5:]) / 5
    assert (tmp_path / "step-40" / "model.safetensors").exists()


def test_the_loss_is_the_policy_gradient_of_the_groups_advantages(tmp_path, model, examples) -> None:
    trainer = trainer_for(SMALL, model, examples, tmp_path)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    ids = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(4, 3, dtype=torch.long)
    batch: dict[str, Any] = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": ones,
        "completion_ids": ids[:, 3:],
        "completion_mask": ones,
        "advantages": advantage,
        "num_items_in_batch": torch.tensor(12),
    }
    trainer.model.eval()  # no accumulation of batches
    total = SMALL.total_loss(trainer, batch)
    policy = trainer.model
    log_probs = policy(input_ids=ids).logits.log_softmax(-1)[:, 2:-1].gather(2, ids[:, 3:, None])[..., 0]
    # At the policy that sampled them the ratio is 1, and its gradient that of the log-probability.
    expected = -(advantage[:, None] * log_probs).sum() / 12 * 4
    weights = [policy.get_input_embeddings().weight, policy.get_output_embeddings().weight]
    for gradient, known in zip(
        torch.autograd.grad(total, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(gradient, known, rtol=1e-4, atol=1e-6)


def test_settings_that_cannot_train_are_refused_with_the_mend(tmp_path, model, examples) -> None:
    with pytest.raises(ValueError, match=r"a batch of 8 completions: set training\.batch_size=9"):
        trainer_for(GRPO(generations=3), model, examples, tmp_path)
    with pytest.raises(ValueError, match="the model takes 128"):
        trainer_for(GRPO(generations=4, completion=200), model, examples, tmp_path)
    with pytest.raises(ValueError, match="grpo needs preference pairs"):
        SMALL.check(replace(examples, pairs=[]))
    tokens = replace(TRAINING, match="tokens", target=10.0)
    options: dict[str, Any] = {
        "name": "",
        "seed": 0,
        "device": "cpu",
        "log_metrics": Curves(),
    }
    with pytest.raises(ValueError, match="match=tokens counts the tokens of the data"):
        fit(SMALL, network(model.tokenizer), model.tokenizer, examples, tokens, tmp_path, **options)


def test_no_gradient_is_gathered_of_sampled_completions_and_the_log_says_so(model, examples, caplog) -> None:
    params = dict(model.network.named_parameters())
    passes = gradient_moments(model, params, SMALL, TRAINING, examples, Gathering(prompts=4), seed=0)
    assert list(passes) == [] and "completions that the policy samples" in caplog.text
    with pytest.raises(NotImplementedError, match="no fixed batch"):
        SMALL.scored({})
