from dataclasses import replace

import pytest
import torch
from networks import language_model
from torch.testing import assert_close

from weightgeom.causal.effects import STATE_UNITS
from weightgeom.data.world import World
from weightgeom.estimators.hidden_states import Tail
from weightgeom.interfaces import Setting
from weightgeom.interventions import bypass, repair, steer
from weightgeom.text.examples import Question
from weightgeom.text.tokens import prompts
from weightgeom.uncertainty.state_edits import (
    LayerStates,
    StateEdit,
    StateEditSettings,
    states_and_evaluation,
)

WORLD = World(
    groups=("known", "heldout", "impossible"),
    entities=40,
    heldout_entities=8,
    values=6,
    documents=20,
    pairs=20,
    heldout=6,
    group_size=24,
)
EXAMPLES = WORLD.examples()
ASKED = StateEditSettings(random=3, level=0.25, prompts=24)
EDITS = {
    "steer": steer.Steer(strengths=[1.0], prompted=ASKED),
    "bypass": bypass.Bypass(strengths=[8.0], prompted=ASKED),
    "repair": repair.Repair(strengths=[0.5], prompted=ASKED),
}


def setting(name="gpt_neox", examples=EXAMPLES):
    torch.manual_seed(0)
    model, weights = language_model(name, WORLD.tokenizer())
    return Setting(model, weights, weights, False, examples, 0)


def log_metrics(metrics, done):
    pass


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize("kind", sorted(EDITS))
def test_every_arm_has_every_effect_and_its_controls_are_matched(kind, name):
    given, edit, done = setting(name), EDITS[kind], []
    edit.check(given.model.architecture)
    rows = edit.rows(given, lambda metrics, count: done.append(count))
    assert done == list(range(1, edit.arms(given.model.architecture) + 1)) and len(done) == 8
    effects = {"abstention_change", "false_abstention_change", "factual_accuracy_change", "kl_from_unedited"}
    for layer in (0, 1):
        for arm in (kind, *(f"random.{draw}" for draw in range(3))):
            dose = f"{edit.strengths[0]:g}"
            quantities = {
                row["quantity"] for row in rows if row.get("layer") == layer and row["arm"] == f"{arm}@{dose}"
            }
            assert quantities == effects
    assert {row["quantity"] for row in rows if row["arm"] == "unedited"} == {
        "abstention", "false_abstention", "factual_accuracy"
    }  # fmt: skip
    assert any(row["quantity"] == "abstention_change_p_value" for row in rows)


def test_a_bypass_strong_enough_makes_every_prompt_abstain_and_what_is_lost_is_accuracy():
    given = setting()
    rows = bypass.Bypass(strengths=[1e4], prompted=replace(ASKED, layers=[1])).rows(given, log_metrics)
    values = {(row["quantity"], row["arm"]): row["value"] for row in rows}
    for name in ("abstention", "false_abstention"):
        assert values[name, "unedited"] + values[f"{name}_change", "bypass@10000"] == 1
    assert values["factual_accuracy", "unedited"] + values["factual_accuracy_change", "bypass@10000"] == 0


def test_no_shift_changes_nothing_and_a_shift_of_the_last_state_is_that_of_the_network(generator):
    given = setting("qwen2")
    _, evaluation = states_and_evaluation(ASKED, given, given.start)
    n, d = 24, 32
    nothing = evaluation.changed_by(StateEdit(0, torch.zeros(n, d), torch.zeros(n)))
    assert all(float(change.abs().max()) < 1e-6 for change in nothing.values())
    # Behind the last layer a shift of the state goes through the final norm and the unembedding alone.
    added = torch.randn(n, d, generator=generator)
    part = evaluation.parts[0]
    tail = Tail.of_batch(given.model, evaluation.network, part.batch, 1)
    network = given.model.with_weights(given.start).eval()
    norm, head = network.model.norm, network.lm_head
    with torch.no_grad():
        expected = head(norm(tail.states + added))
        assert_close(tail.logits(added, part.last, 1)[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_abstaining_is_to_have_every_token_of_a_phrase_as_the_likeliest_in_turn():
    given = setting()
    _, evaluation = states_and_evaluation(ASKED, given, given.start)
    tokenizer, network = given.model.tokenizer, evaluation.network
    shift = StateEdit(1, torch.zeros(24, 32), torch.linspace(0, 12, 24))
    effects = evaluation._samples(shift)[0]
    groups = [*evaluation.parts[0].prompts]
    expected = []
    for index in groups:
        start = evaluation.parts[0].batch.input_ids[index][: evaluation.parts[0].last[index] + 1].tolist()
        abstains = False
        for phrase in evaluation.phrases:
            likeliest = True
            for place, token in enumerate(phrase):
                with torch.no_grad():
                    logits = network(torch.tensor([[*start, *phrase[:place]]])).logits[0, -1].clone()
                logits[evaluation.first if place == 0 else [token]] += shift.logits[index]
                likeliest &= int(logits.argmax()) == token
            abstains |= likeliest
        expected.append(float(abstains))
    assert effects["false_abstention"].tolist() + effects["abstention"].tolist() == expected
    assert 0 < sum(expected) < 24 and tokenizer


def test_the_edits_are_what_they_say(generator):
    factual = torch.randn(30, 8, generator=generator) * torch.tensor([5.0, 5, 5, 5, 0.01, 0.01, 0.01, 0.01])
    uncertain, edited = factual + 3 * torch.eye(8)[0], torch.randn(6, 8, generator=generator)
    ground = LayerStates(1, factual, uncertain, edited)
    steered = steer.Steer().shift(ground, 0.5, None)
    assert_close(steered.states, 0.5 * ground.norm * torch.eye(8)[0].expand(6, -1), rtol=1e-5, atol=1e-5)
    assert_close(steered.norm, 0.5 * ground.norm, rtol=1e-5, atol=0)
    # Four axes hold all but a millionth of the variance: the others are drawn to the mean.
    repaired = edited + repair.Repair().shift(ground, 1.0, None).states
    assert_close(repaired[:, 4:], factual.mean(0)[4:].expand(6, -1), rtol=0, atol=0.05)
    assert_close(repaired[:, :4], edited[:, :4], rtol=0, atol=0.05)
    ends = LayerStates(
        1,
        factual,
        uncertain,
        torch.stack([uncertain.mean(0) + 50 * torch.eye(8)[0], factual.mean(0) - 50 * torch.eye(8)[0]]),
    )
    assert_close(bypass.Bypass().shift(ends, 7.0, None).logits, torch.tensor([7.0, 0.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": [2]}, "there is no layer 2: the model has layers 0 to 1"),
        ({"random": 2}, "2 random controls give p-values of 0.333"),
    ],
)
def test_what_the_model_does_not_allow_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        steer.Steer(prompted=replace(ASKED, **changed)).check(setting().model.architecture)
    with pytest.raises(ValueError, match="strengths must be positive and finite, got -1"):
        steer.Steer(strengths=[-1.0], prompted=ASKED).check(setting().model.architecture)


def test_groups_that_will_not_do_are_refused():
    with pytest.raises(ValueError, match="unknown uncertain group 'rare'; choose from heldout, impossible"):
        replace(ASKED, uncertain="rare").check_examples(EXAMPLES)
    unanswered = {"known": [Question("a", "")], "heldout": [Question("b", "")]}
    with pytest.raises(ValueError, match="no prompt of the group 'known' has an answer"):
        ASKED.check_examples(replace(EXAMPLES, groups=unanswered))
    assert set(EXAMPLES.groups) and {"abstention", "false_abstention", "factual_accuracy"} == set(STATE_UNITS)
    assert prompts([EXAMPLES.groups["known"][0].prompt], WORLD.tokenizer()).target.sum() == 1
