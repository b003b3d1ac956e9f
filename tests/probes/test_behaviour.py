import logging
from dataclasses import replace
from math import log, sqrt

import pytest
import torch
from torch.testing import assert_close

from weightgeom.interfaces import Setting
from weightgeom.probes.behaviour import Behaviour
from weightgeom.text.examples import Pair
from weightgeom.text.tokens import packed, tokenize


def setting(model, examples, start, end=None, from_random=False):
    return Setting(model, start, end or start, from_random, examples, 0)


def by_name(rows):
    return {row["quantity"]: row for row in rows}


def changed(params, scale=0.02):
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + scale * torch.randn(value.shape, generator=generator) for name, value in params.items()
    }


@pytest.fixture
def uniform(params):
    """Weights that predict every token alike: the unembedding is zero, and has no bias."""
    return params | {"lm_head.weight": torch.zeros_like(params["lm_head.weight"])}


def test_a_uniform_prediction_has_the_loss_ln_v(model, examples, uniform):
    rows = by_name(Behaviour().measurement(setting(model, examples, uniform))(uniform))
    loss = rows["heldout_ce"]
    assert_close(loss["value"], log(len(model.tokenizer)), rtol=1e-6, atol=0)  # fp32
    assert loss["unit"] == "nats/token" and abs(loss["stderr"]) < 1e-8
    # 6 documents and their ends, end to end in sequences of 96, whose first tokens are no targets
    words = sum(len(text.split()) + 1 for text in examples.heldout)
    sequences = -(-words // 96)
    assert loss["n"] == words - sequences


def test_a_uniform_prediction_prefers_the_shorter_response_by_its_length(model, examples, uniform):
    pairs = examples.heldout_pairs[:5]
    rows = by_name(Behaviour(pairs=5).measurement(setting(model, examples, uniform))(uniform))
    lengths = [tuple(map(len, tokenize(pair, model.tokenizer)[1:])) for pair in pairs]
    margins = [(rejected - chosen) * log(len(model.tokenizer)) for chosen, rejected in lengths]
    mean = sum(margins) / 5
    # standard error √(Σ (m - mean)² / (n - 1) / n), n = 5
    error = sqrt(sum((margin - mean) ** 2 for margin in margins) / 4 / 5)
    margin = rows["preference_margin"]
    assert (margin["unit"], margin["n"]) == ("nats/pair", 5) and error > 0
    assert_close((margin["value"], margin["stderr"]), (mean, error), rtol=1e-5, atol=1e-4)
    accuracy = rows["preference_accuracy"]
    share = sum(chosen < rejected for chosen, rejected in lengths) / 5  # a tie is no preference
    assert (accuracy["unit"], accuracy["n"]) == ("1", 5)
    # of n zeros and ones: √(p (1 - p) / (n - 1))
    assert_close((accuracy["value"], accuracy["stderr"]), (share, sqrt(share * (1 - share) / 4)))


def test_swapping_chosen_and_rejected_turns_margin_and_accuracy_around(model, examples, params):
    turned = [Pair(pair.prompt, pair.rejected, pair.chosen) for pair in examples.heldout_pairs]
    as_given, other = (
        by_name(Behaviour().measurement(setting(model, data, params))(params))
        for data in (examples, replace(examples, heldout_pairs=turned))
    )
    assert as_given["preference_margin"]["value"] == -other["preference_margin"]["value"] != 0
    assert_close(as_given["preference_accuracy"]["value"] + other["preference_accuracy"]["value"], 1.0)


def test_the_divergence_is_0_at_the_base_and_positive_elsewhere(model, examples, params):
    measure = Behaviour().measurement(setting(model, examples, params))
    at_base, elsewhere = by_name(measure(params)), by_name(measure(changed(params)))
    assert at_base["kl_from_base"]["value"] == at_base["kl_from_base"]["stderr"] == 0
    assert elsewhere["kl_from_base"]["value"] > 1e-3
    assert elsewhere["kl_from_base"]["n"] == elsewhere["heldout_ce"]["n"]


def test_the_divergence_from_a_uniform_base_is_what_the_mean_log_prob_lacks(model, examples, params, uniform):
    (batch,) = packed(examples.heldout, model.tokenizer, length=96, limit=4096)
    log_q = model.logits(params, batch)[:, :-1].double().log_softmax(-1)[batch.target[:, 1:]]
    # KL(uniform || q) = Σ_v 1/V (log 1/V - log q_v)
    expected = -log(len(model.tokenizer)) - log_q.mean()
    rows = by_name(Behaviour().measurement(setting(model, examples, uniform))(params))
    assert_close(rows["kl_from_base"]["value"], expected.item(), rtol=1e-5, atol=0)


def test_the_divergence_of_a_tiny_update_is_quadratic_in_it(model, examples, params):
    measure = Behaviour(tokens=300).measurement(setting(model, examples, params))
    small, ten = (by_name(measure(changed(params, scale)))["kl_from_base"] for scale in (1e-5, 1e-4))
    # Ten times the update, a hundred times the KL; the next order is some 1 %, the fp32 forward more.
    assert 80 < ten["value"] / small["value"] < 120


def test_the_divergence_is_from_the_end_where_the_start_is_random(model, examples, params):
    start, end = changed(params), params
    measure = Behaviour().measurement(setting(model, examples, start, end, from_random=True))
    assert by_name(measure(end))["kl_from_base"]["value"] == 0
    assert by_name(measure(start))["kl_from_base"]["value"] > 0


def test_no_more_than_the_tokens_and_pairs_asked_for_are_used(model, examples, params):
    rows = by_name(
        Behaviour(tokens=30, pairs=3, length=10).measurement(setting(model, examples, params))(params)
    )
    assert rows["heldout_ce"]["n"] == 27  # 3 sequences of 10, without their first tokens
    longer = by_name(Behaviour(pairs=3).measurement(setting(model, examples, params))(params))
    assert longer["preference_margin"]["n"] == 3


def test_pairs_whose_prompts_are_too_long_are_left_out_and_the_log_says_so(model, examples, params, caplog):
    question = str(examples.heldout_pairs[0].prompt)
    longer = [Pair(f"question : {question}", "a", "b"), *examples.heldout_pairs]
    data = replace(examples, heldout_pairs=longer)
    length = len(tokenize(longer[0], model.tokenizer)[0])  # 2 more than that of the others, which is 9
    with caplog.at_level(logging.INFO):
        probe = Behaviour(pair_length=length)
        rows = by_name(probe.measurement(setting(model, data, params))(params))
    assert rows["preference_margin"]["n"] == 6
    assert f"1 of 7 held-out pairs left out: prompt of {length} tokens or more" in caplog.text
    caplog.clear()
    Behaviour().measurement(setting(model, examples, params))
    assert "left out" not in caplog.text


def test_what_the_data_lack_is_left_out(model, examples, params):
    no_text, no_pairs = replace(examples, heldout=[]), replace(examples, heldout_pairs=[])
    names = [
        set(by_name(Behaviour().measurement(setting(model, data, params))(params)))
        for data in (no_text, no_pairs, replace(no_text, heldout_pairs=[]))
    ]
    assert names == [{"preference_accuracy", "preference_margin"}, {"heldout_ce", "kl_from_base"}, set()]


def test_a_single_pair_has_no_standard_error(model, examples, params):
    rows = by_name(Behaviour(pairs=1).measurement(setting(model, examples, params))(params))
    assert rows["preference_margin"]["stderr"] is None and rows["preference_margin"]["n"] == 1


def test_every_architecture_will_do(model):
    Behaviour().check(model.architecture)
