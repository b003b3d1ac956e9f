from dataclasses import replace

import pytest
import torch
from networks import FORMS, language_model
from torch.testing import assert_close
from transformers import PreTrainedConfig

from weightgeom.estimators import lm_head as head
from weightgeom.estimators.gradients import sampled
from weightgeom.estimators.lm_head import logit_factor, logits_of, slice_head, token_log_probs
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed


# Gemma-2's logits are capped, GPT-2's head is tied, Granite and Cohere multiply their logits.
@pytest.fixture(params=["gpt_neox", "gemma2", "gpt2", "granite", "cohere2"])
def network(request, tokenizer):
    model, weights = language_model(request.param, tokenizer)
    return model.with_weights(weights).double()


@pytest.mark.parametrize("entries", [1, 400, 2**23])  # of the logits at once: one token, a few, all
def test_log_probs_and_their_gradient_are_those_of_the_whole_logits(network, entries, generator, monkeypatch):
    monkeypatch.setattr(head, "LOGITS", entries)
    d, vocabulary = network.config.hidden_size, network.config.vocab_size
    hidden = (3 * torch.randn(11, d, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(vocabulary, (11,), generator=generator)
    coefficients = torch.randn(11, generator=generator, dtype=torch.float64)

    log_probs = token_log_probs(network, hidden, targets)
    (gradient,) = torch.autograd.grad(log_probs @ coefficients.to(log_probs), hidden)
    factor = {"granite": 1 / 4.0, "cohere2": 0.25}.get(network.config.model_type, 1.0)
    logits = factor * network.get_output_embeddings()(hidden)
    cap = getattr(network.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (wanted,) = torch.autograd.grad(expected @ coefficients, hidden)
    # The logits are taken in fp32.
    assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_a_token_of_next_to_no_probability_has_a_finite_log_prob(network):
    d, vocabulary = network.config.hidden_size, network.config.vocab_size
    hidden = torch.full((1, d), 100.0, dtype=torch.float64)
    log_probs = [token_log_probs(network, hidden, torch.tensor([token])) for token in range(vocabulary)]
    assert torch.cat(log_probs).isfinite().all() and float(min(log_probs)) < -20


def test_no_token_is_no_log_prob(network):
    hidden = torch.zeros(0, network.config.hidden_size, dtype=torch.float64)
    assert token_log_probs(network, hidden, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("name", FORMS)
def test_the_logits_of_hidden_states_are_those_of_the_whole_network(name, tokenizer, generator):
    model, weights = language_model(name, tokenizer)
    network = model.with_weights(weights)
    tokens = {"input_ids": torch.randint(3, 100, (2, 9), generator=generator), "use_cache": False}
    expected = network(**tokens).logits
    hidden = network.base_model(**tokens).last_hidden_state
    # The same sums in batches of another shape.
    assert_close(logits_of(network, hidden.flatten(0, 1)), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "factor"),
    [({"logit_scale": 0.5}, 0.5), ({"logits_scaling": 4.0}, 0.25), ({"lm_head_multiplier": None}, 1.0)],
)
def test_logits_are_multiplied_by_what_the_config_names(given, factor):
    assert logit_factor(PreTrainedConfig(**given)) == factor


def test_multiplied_logits_with_a_bias_are_refused(tokenizer):
    model, weights = language_model("phi", tokenizer)
    network = model.with_weights(weights)
    network.config.logit_scale = 0.5
    message = "the network multiplies its logits, the bias of its head included"
    with pytest.raises(NotImplementedError, match=message):
        token_log_probs(network, torch.zeros(1, 32), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
@pytest.mark.parametrize("objective", [CE("chosen"), CE("text"), DPO(), DPO(loss_type="ipo")])
def test_the_loss_of_a_trainer_is_the_same_with_the_sliced_head(
    name, objective, examples, tokenizer, tmp_path
):
    model, weights = language_model(name, tokenizer)
    arguments = Training(max_length=48).arguments(tmp_path, 0, "cpu")
    losses = []
    for sliced in (False, True):
        network = model.with_weights(weights)
        trainer = objective.trainer(network, tokenizer, sampled(examples, 4, 48, 0), arguments)
        inputs = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        if sliced:
            slice_head(trainer, network)
        with outdated_name_allowed():
            losses.append(objective.total_loss(trainer, inputs))
    assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_where_more_than_log_probs_enters_the_loss_the_trainers_own_head_remains(
    examples, tokenizer, tmp_path
):
    model, weights = language_model("gpt_neox", tokenizer)
    arguments = Training(max_length=48).arguments(tmp_path, 0, "cpu")
    for objective, own in ((DPO(options={"use_weighting": True}), True), (DPO(), False)):
        network = model.with_weights(weights)
        trainer = objective.trainer(
            network, tokenizer, replace(examples, pairs=examples.pairs[:4]), arguments
        )
        before = network.forward
        slice_head(trainer, network)
        assert (network.forward == before) == own
