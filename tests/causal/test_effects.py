from dataclasses import replace

import pytest
import torch
from moving import matrix_of, moved
from networks import FORMS, language_model
from precise import Precise
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from weightgeom.causal.directions import haar, top_pair
from weightgeom.causal.edits import RankOne
from weightgeom.causal.effects import DIFFERENTIABLE, UNITS, Effects, Evaluation
from weightgeom.models.residual import ATTENTION, MLP, module_path
from weightgeom.text.examples import Pair, Question
from weightgeom.text.tokens import packed, responses

EFFECTS = Effects(tokens=160, length=24, pairs=6, pair_length=48, questions=12)


@pytest.fixture(scope="module", params=FORMS)
def evaluation(request, tokenizer, examples):
    """Of a network in fp64."""
    model, weights = language_model(request.param, tokenizer)
    double = {name: weight.double() for name, weight in weights.items()}
    with Precise():
        yield Evaluation(model, double, padded(examples), EFFECTS)


def padded(examples):
    """With a pair that is shorter than the others."""
    short = Pair("question : ", "a .", "the home .")
    return replace(examples, heldout_pairs=[short, *examples.heldout_pairs])


@pytest.fixture
def small(model, params, examples):
    """Of a GPT-NeoX of two layers, in fp32."""
    return Evaluation(model, params, examples, EFFECTS)


def steps(evaluation, generator, kinds=None):
    """A sizeable random edit of every matrix."""
    for matrix in evaluation.architecture.matrices:
        weight = matrix.of(evaluation.params)
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        if kinds is None or matrix.kind in kinds:
            yield matrix, matrix.replaced(evaluation.params, weight + noise / 10)


def means(samples):
    return {name: float(values.double().mean()) for name, values in samples.items()}


def whole(evaluation, edited, monkeypatch):
    """The samples of a forward pass that passes nothing over."""
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "_unchanged", lambda self, changed: {})
        return evaluation.samples(edited)


def test_the_first_order_effect_is_the_whole_effect_of_a_weak_edit_of_every_matrix(evaluation):
    matrices = evaluation.architecture.matrices
    gradients = evaluation.gradients({matrix.parameter for matrix in matrices})
    for matrix in matrices:
        norm = float(matrix.of(evaluation.params).norm())
        for behaviour in DIFFERENTIABLE:
            u, v = top_pair(gradients[behaviour], matrix, "gradient")
            # The second order of α = 1e-3 ‖W‖ is up to 15 % here, and proportional; rounding is 1e-8 of the
            # effect, which is about 1e-7 nats.
            edit = RankOne(matrix, 1e-7 * norm, u, v)
            predicted = edit.first_order(gradients[behaviour])
            actual = float(evaluation.change(edit.applied(evaluation.params))[behaviour].mean())
            assert predicted > 1e-8
            assert_close(actual / predicted, 1.0, rtol=1e-4, atol=0)


def test_gradients_are_those_of_finite_differences_whatever_the_direction(evaluation, generator):
    names = sorted({matrix.parameter for matrix in evaluation.architecture.matrices})
    gradients = evaluation.gradients(names)
    for name in names:
        weight = evaluation.params[name]
        step = 1e-6 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        there, back = (
            means(evaluation.samples({**evaluation.params, name: weight + sign * step})) for sign in (1, -1)
        )
        for behaviour in DIFFERENTIABLE:
            slope = float((gradients[behaviour][name] * step).sum())
            # Central differences leave the third order; means of order 1 are good to 1e-14.
            assert_close((there[behaviour] - back[behaviour]) / 2, slope, rtol=1e-5, atol=1e-12)


def test_what_lies_behind_the_edit_gives_what_a_whole_forward_pass_gives(evaluation, generator, monkeypatch):
    for matrix, edited in steps(evaluation, generator):
        effects, expected = evaluation.samples(edited), whole(evaluation, edited, monkeypatch)
        assert_close(
            effects, expected, rtol=0, atol=0, msg=lambda text, matrix=matrix: f"{matrix.name}: {text}"
        )
        assert float(effects["kl_from_unedited"].mean()) > 1e-6


@pytest.mark.parametrize("order", [(0, 1, 0, 1), (1, 0, 1)])
def test_layers_may_alternate_and_be_edited_together(evaluation, generator, monkeypatch, order):
    edits = list(steps(evaluation, generator, kinds=("k", "down")))
    for layer in order:
        for edited in (edited for matrix, edited in edits if matrix.layer == layer):
            assert_close(evaluation.samples(edited), whole(evaluation, edited, monkeypatch), rtol=0, atol=0)
    both = evaluation.params
    for matrix, edited in edits:
        both = matrix.replaced(both, matrix.of(edited))
    assert_close(evaluation.samples(both), whole(evaluation, both, monkeypatch), rtol=0, atol=0)


@pytest.mark.parametrize("where", ["embed", "unembed", "norm", "matrix"])
def test_the_effects_of_an_edit_are_those_of_another_network_with_the_edited_weights(
    evaluation, where, tokenizer, examples, generator
):
    architecture = evaluation.architecture
    network = evaluation.network
    name = {
        "embed": architecture.embed,
        "unembed": architecture.unembed if architecture.unembed in evaluation.params else architecture.embed,
        "norm": architecture.final_norm.parameter,
        "matrix": architecture.matrices[-1].parameter,
    }[where]
    weight = evaluation.params[name]
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    edited = {**evaluation.params, name: weight + noise / 20}
    effects = evaluation.samples(edited)

    other = _copied(network, edited)
    examples = padded(examples)
    losses, divergences_, counts = [], [], []
    for batch in packed(examples.heldout, tokenizer, EFFECTS.length, EFFECTS.tokens):
        then, now = _logits(network, batch), _logits(other, batch)
        for row, target in enumerate(batch.target[:, 1:]):
            counts.append(int(target.sum()))
            losses.append(-_log_probs(now, batch)[row][target].sum())
            p, q = (Categorical(logits=logits[row][target].double()) for logits in (then, now))
            divergences_.append(kl_divergence(p, q).sum())
    tokens = sum(counts) / len(counts)
    assert_close(effects["heldout_ce"], torch.stack(losses) / tokens, rtol=1e-9, atol=0)
    assert_close(effects["kl_from_unedited"], torch.stack(divergences_) / tokens, rtol=1e-7, atol=1e-12)
    # So the mean over sequences is the mean over tokens, though the last sequence is shorter.
    assert counts[-1] < counts[0]
    mean = float(torch.stack(losses).sum()) / sum(counts)
    assert float(effects["heldout_ce"].mean()) == pytest.approx(mean)
    margins = []
    for chosen, rejected in responses(
        examples.heldout_pairs[: EFFECTS.pairs], tokenizer, EFFECTS.pair_length
    ):
        sums = [
            (_log_probs(_logits(other, side), side) * side.target[:, 1:]).sum(1)
            for side in (chosen, rejected)
        ]
        margins.append(sums[0] - sums[1])
    margin = torch.cat(margins)
    assert_close(effects["preference_margin"], margin, rtol=1e-9, atol=1e-9)
    assert effects["preference_accuracy"].tolist() == [float(value > 0) for value in margin]


def _copied(network, params):
    """A network of its own, whose weights are loaded in place."""
    other = type(network)(network.config).double().eval()
    other.load_state_dict(dict(params), strict=False)
    other.tie_weights()
    return other


@torch.no_grad()
def _logits(network, batch):
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return network(**given, position_ids=batch.positions()).logits[:, :-1]


def _log_probs(logits, batch):
    return logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]


def test_losses_and_margins_are_those_of_the_models_log_probs(model, params, examples, small, generator):
    deltas = {"L1.o": torch.randn(32, 32, generator=generator) / 10}
    edited = moved(model, params, deltas)
    effects = small.samples(edited)
    losses, counts = [], []
    for batch in packed(examples.heldout, model.tokenizer, EFFECTS.length, EFFECTS.tokens):
        losses.append(-model.log_probs(edited, batch).sum(1))
        counts.append(batch.target[:, 1:].sum(1))
    tokens = torch.cat(counts).float().mean()
    # fp32 logits of order 10 in another order of summation.
    assert_close(effects["heldout_ce"], torch.cat(losses) / tokens, rtol=1e-5, atol=1e-5)
    ((chosen, rejected),) = responses(examples.heldout_pairs[:6], model.tokenizer, EFFECTS.pair_length)
    margin = model.log_probs(edited, chosen).sum(1) - model.log_probs(edited, rejected).sum(1)
    assert_close(effects["preference_margin"], margin, rtol=1e-5, atol=1e-4)


def test_a_question_is_answered_if_every_token_of_the_answer_is_the_likeliest(model, params, examples):
    vocabulary = model.tokenizer.get_vocab()
    words = {index: word for word, index in vocabulary.items()}

    def likeliest(prompt):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        return words[int(model.network(input_ids=ids).logits[0, -1].argmax())]

    questions, expected = [], []
    for pair in examples.pairs[:8]:
        prompt = str(pair.prompt).strip()
        first = likeliest(prompt)
        second = likeliest(f"{prompt} {first}")
        other = "home" if second != "home" else "the"
        for answer in (f" {first}", f" {first} {second}", f" {first} {other}", f" {other} {second}"):
            questions.append(Question(prompt, answer))
            tokens = answer.split()
            # Token by token, each behind the answer's own beginning.
            right = [
                likeliest(" ".join([prompt, *tokens[:place]])) == tokens[place]
                for place in range(len(tokens))
            ]
            expected.append(float(all(right)))
    assert 0 < sum(expected) < len(expected)
    evaluation = Evaluation(
        model, params, replace(examples, questions=questions), replace(EFFECTS, questions=32)
    )
    assert evaluation.unedited["fact_accuracy"].tolist() == expected


def test_the_unedited_model_changes_nothing(small):
    change = small.change(small.params)
    assert change.keys() == UNITS.keys()
    assert all(not values.any() for values in change.values())


def test_a_change_is_the_difference_to_the_unedited_model_but_for_the_divergence(small, generator):
    for _, edited in steps(small, generator, kinds=("o",)):
        samples, change = small.samples(edited), small.change(edited)
        for name, values in samples.items():
            before = small.unedited[name] if name != "kl_from_unedited" else 0
            assert_close(change[name], values - before, rtol=0, atol=0)


def test_effects_are_measured_on_as_much_as_is_asked_for(model, params, examples):
    asked = Effects(tokens=50, length=10, pairs=3, questions=7)
    unedited = Evaluation(model, params, examples, asked).unedited
    sizes = {name: len(values) for name, values in unedited.items()}
    text, pairs = ("heldout_ce", "kl_from_unedited"), ("preference_margin", "preference_accuracy")
    assert sizes == {**dict.fromkeys(text, 5), **dict.fromkeys(pairs, 3), "fact_accuracy": 7}
    less = Evaluation(model, params, examples, replace(asked, pairs=0, questions=0))
    assert less.unedited.keys() == {"heldout_ce", "kl_from_unedited"}
    assert less.gradients(["lm_head.weight"]).keys() == {"heldout_ce"}


@pytest.mark.parametrize(
    ("edited", "passed_over"),
    [
        (["L1.up"], "gpt_neox.layers.1.attention"),
        (["L1.q", "L1.o"], "gpt_neox.layers.1.mlp"),  # which is parallel to the attention
        (["L1.q", "L1.up"], "gpt_neox.layers.0"),
    ],
)
def test_what_does_not_lie_behind_the_edit_is_not_run_again(small, model, edited, passed_over, generator):
    params = small.params
    for name in edited:
        matrix = matrix_of(model, name)
        noise = torch.randn(matrix.of(params).shape, generator=generator)
        params = matrix.replaced(params, matrix.of(params) + noise)
    expected = small.samples(params)
    ran = []
    for name, module in small.network.named_modules():
        module.register_forward_pre_hook(lambda module, given, name=name: ran.append(name))
    assert_close(small.samples(params), expected, rtol=0, atol=0)
    assert "gpt_neox.layers.1" in ran
    assert not [name for name in ran if name.startswith(("gpt_neox.layers.0.", f"{passed_over}."))]


def test_measuring_mutates_no_weight(model, params, examples, generator):
    before = {name: weight.clone() for name, weight in params.items()}
    evaluation = Evaluation(model, params, examples, EFFECTS)
    for _, edited in steps(evaluation, generator):
        evaluation.samples(edited)
    evaluation.gradients(["lm_head.weight"])
    assert_close(params, before, rtol=0, atol=0)
    assert_close(evaluation.params, before, rtol=0, atol=0)
    assert_close(evaluation.samples(evaluation.params), evaluation.unedited, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_held_in_fp32_or_better(model, params, examples, stored, held):
    evaluation = Evaluation(
        model, {name: weight.to(stored) for name, weight in params.items()}, examples, EFFECTS
    )
    assert {weight.dtype for weight in evaluation.params.values()} == {held}
    assert evaluation.unedited["heldout_ce"].dtype == held


def test_the_module_of_a_layer_is_what_its_matrices_have_in_common(tokenizer):
    expected = {
        "gpt_neox": ("gpt_neox.layers.1", "gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp"),
        "gpt2": ("transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp"),
        "phi3": ("model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp"),
    }
    for name, paths in expected.items():
        architecture = language_model(name, tokenizer)[0].architecture
        parts = (ATTENTION | MLP, ATTENTION, MLP)
        assert tuple(module_path(architecture, 1, part) for part in parts) == paths


def test_text_that_holds_nothing_is_refused(model, params, examples):
    with pytest.raises(ValueError, match=r"the held-out text has fewer than 2 tokens"):
        Evaluation(model, params, replace(examples, heldout=[]), EFFECTS)


def test_the_first_order_effect_of_a_random_direction(small, model):
    matrix = matrix_of(model, "L0.k")
    edit = RankOne(matrix, 0.5, haar(32, "u"), haar(32, "v"))
    gradients = small.gradients([matrix.parameter])["heldout_ce"]
    G = matrix.of(gradients).double()
    # α uᵀ G v, term by term
    expected = sum(0.5 * float(edit.u[i] * G[i, j] * edit.v[j]) for i in range(32) for j in range(32))
    assert_close(edit.first_order(gradients), expected, rtol=1e-6, atol=1e-12)
