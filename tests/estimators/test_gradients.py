"""Moments under an objective, against plain autograd on the trainer's own loss."""

from dataclasses import replace
from weakref import ref

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from weightgeom.estimators.gradients import Gathering, Pass, gradient_moments, prompts_at_once, sampled
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed

TRAINING = Training(max_length=48)
OBJECTIVES = {
    "ce on text": CE("text"),
    "ce on chosen": CE("chosen"),
    "dpo": DPO(),
    "ipo": DPO(loss_type="ipo"),
}


def random_model(config_class, network_class, tokenizer, **sizes) -> LanguageModel:
    """A small random network of an architecture, its weights drawn here."""
    config = config_class(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1, **sizes)
    network = network_class(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) / 4
        parameter.copy_(noise + 1 if "norm" in name or "ln_" in name else noise)
    return LanguageModel(network, tokenizer, architecture_of(config))


@pytest.fixture(scope="module")
def models(model, tokenizer) -> dict[str, LanguageModel]:
    """Fused by head and parallel; transposed, in thirds; separate, gated, sequential; flattened MLP."""
    llama = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    opt = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "pad_token_id": 2,
    }
    return {
        "gpt_neox": model,
        "gpt2": random_model(GPT2Config, GPT2LMHeadModel, tokenizer, n_embd=32, n_layer=2, n_head=4),
        "llama": random_model(LlamaConfig, LlamaForCausalLM, tokenizer, **llama),
        "opt": random_model(OPTConfig, OPTForCausalLM, tokenizer, **opt),
    }


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.network.named_parameters()}


def gathered(model, objective, examples, **options) -> list[Pass]:
    gathering = Gathering(**{"prompts": 6, "batch_size": 2, **options})
    return list(gradient_moments(model, weights(model), objective, TRAINING, examples, gathering, seed=5))


def by_autograd(model, objective, examples, tmp_path, prompts=6):
    """Inputs and upstream gradients of every module with their masks, and gradients of the mean loss.

    On all prompts in one batch, in the order that the gathering has them, by hooks and leaf weights.
    """
    network = model.with_weights(weights(model)).eval()
    arguments = TRAINING.arguments(tmp_path, 5, "cpu") | {"per_device_eval_batch_size": prompts}

    trainer = objective.trainer(network, model.tokenizer, sampled(examples, prompts, 48, 5), arguments)
    data = trainer.train_dataset.shuffle(seed=5).select(range(prompts))
    (inputs,) = list(trainer.get_eval_dataloader(data))
    network.requires_grad_(True)
    read, sent = {}, {}
    batch = inputs["attention_mask"].shape
    modules = {matrix.module for matrix in model.architecture.matrices}
    for name in modules:

        def hook(module, given, output, name=name):
            read[name] = given[0].detach().reshape(*batch, -1)
            output.register_hook(lambda grad: sent.__setitem__(name, grad.reshape(*batch, -1)))

        network.get_submodule(name).register_forward_hook(hook)
    scored = objective.scored(inputs)
    with outdated_name_allowed():
        trainer.compute_loss(network, inputs).backward()  # the mean, as the library takes it
    return scored, inputs["attention_mask"].bool(), read, sent, network


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama", "opt"])
def test_gradients_and_moments_are_those_of_autograd_on_the_trainers_mean_loss(
    models, architecture, objective, examples, tmp_path
):
    model = models[architecture]
    scored, attention, read, sent, network = by_autograd(model, objective, examples, tmp_path)
    predicting = torch.zeros_like(attention)
    predicting[:, :-1] = scored.targets[:, 1:]
    terms = sum(scored.terms)
    matrices = {matrix.name: matrix for matrix in model.architecture.matrices}
    for positions, where in (("all", attention), ("scored", predicting)):
        (gathered_pass,) = gathered(model, objective, examples, positions=positions)
        assert gathered_pass.gradients.keys() == {matrix.parameter for matrix in matrices.values()}
        for name, gradient in gathered_pass.gradients.items():
            expected = network.get_parameter(name).grad
            # fp32 sums over some 200 tokens, in another order and in other batches.
            assert_close(gradient.value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        for site, moment in gathered_pass.inputs.items():
            a = read[site.module][where]
            assert moment.samples == len(a)
            expected = a.T @ a / len(a)
            assert_close(moment.value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        writes = {name for name, matrix in matrices.items() if matrix.role == "write"}
        assert gathered_pass.upstream.keys() == writes
        for name, moment in gathered_pass.upstream.items():
            delta = sent[matrices[name].module][where] * terms  # of the sum: the mean's is one term's share
            expected = delta.T @ delta / len(delta)
            assert_close(moment.value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_moment_that_is_taken_out_of_a_pass_is_freed_while_the_pass_goes_on(models, examples):
    model, gathering = models["llama"], Gathering(prompts=6, batch_size=2)
    passes = gradient_moments(model, weights(model), DPO(), TRAINING, examples, gathering, seed=5)
    gathered_pass = next(passes)
    for moments in (gathered_pass.inputs, gathered_pass.upstream):
        sums = [ref(moments.popitem()[1].sums) for _ in range(len(moments))]
        assert len(sums) == 4 and not any(held() is not None for held in sums)


def test_a_parallel_block_shares_its_upstream_gradient_and_a_sequential_one_does_not(models, examples):
    for name, parallel in (("gpt_neox", True), ("llama", False)):
        (gathered_pass,) = gathered(models[name], DPO(), examples)
        for layer in (0, 1):
            o, down = gathered_pass.upstream[f"L{layer}.o"], gathered_pass.upstream[f"L{layer}.down"]
            assert (o is down) == parallel


def same(measured: list[Pass], expected: list[Pass], rtol: float) -> None:
    def everything(passes):
        moments = {
            key: moment.value for part in passes for key, moment in {**part.inputs, **part.upstream}.items()
        }
        return moments | {key: gradient.value for part in passes for key, gradient in part.gradients.items()}

    first, second = everything(measured), everything(expected)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert_close(value, second[key], rtol=rtol, atol=rtol * float(value.abs().max()))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_nothing_depends_on_the_batch_size(models, objective, examples):
    alone, expected = (gathered(models["llama"], objective, examples, batch_size=size) for size in (1, 6))
    same(alone, expected, rtol=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize("objective", [CE("chosen"), DPO()], ids=["ce", "dpo"])
def test_a_budget_makes_more_passes_with_identical_results(models, objective, examples):
    whole = gathered(models["llama"], objective, examples, groups=3)
    split = gathered(models["llama"], objective, examples, groups=3, budget_gb=1e-9)
    assert [part.layers for part in whole] == [[0, 1]] and [part.layers for part in split] == [[0], [1]]
    same(whole, split, rtol=0)


@pytest.mark.parametrize(
    ("layers", "d_model", "length", "expected"), [(4, 128, 96, 16), (30, 576, 192, 2), (32, 4096, 512, 1)]
)
def test_prompts_at_once_keep_a_gibibyte_for_the_backward_pass(layers, d_model, length, expected):
    assert prompts_at_once(layers, d_model, length, most=16) == expected


def test_groups_of_prompts_add_up_and_are_what_a_bootstrap_draws(models, examples):
    model = models["gpt_neox"]
    (whole,), (grouped,) = (gathered(model, DPO(), examples, groups=groups) for groups in (1, 3))
    same([whole], [grouped], rtol=1e-5)
    gradient = next(iter(grouped.gradients.values()))
    assert gradient.terms.tolist() == [2, 2, 2] and len(gradient.sums) == 3
    times = torch.tensor([2.0, 0.0, 1.0])
    expected = (2 * gradient.sums[0] + gradient.sums[2]) / 6
    assert_close(gradient.drawn(times), expected)
    moment = next(iter(grouped.upstream.values()))
    expected = (2 * moment.sums[0] + moment.sums[2]) / (2 * moment.counts[0] + moment.counts[2]).float()
    assert_close(moment.drawn(times), expected)


def test_squared_gradients_are_of_whole_training_batches_and_of_the_rest_if_it_is_all(models, examples):
    model, params = models["llama"], weights(models["llama"])

    def first_gradient(prompts, step):
        training = Training(max_length=48, batch_size=step)
        gathering = Gathering(prompts=prompts, batch_size=2, groups=2)
        (gathered_pass,) = gradient_moments(model, params, DPO(), training, examples, gathering, seed=5)
        return next(iter(gathered_pass.gradients.values()))

    batch, two_batches = first_gradient(3, 3), first_gradient(7, 3)
    assert_close(batch.squares, batch.value.square(), rtol=1e-4, atol=1e-12)  # a single batch: its own square
    short = first_gradient(2, 3)
    assert_close(short.squares * (2 / 3) ** 2, (short.value * 2 / 3).square(), rtol=1e-4, atol=1e-12)
    six = first_gradient(6, 3)
    assert_close(two_batches.squares, six.squares, rtol=1e-4, atol=1e-12)  # the seventh fills no batch
    assert not torch.allclose(six.squares, batch.squares, rtol=1e-2, atol=0)


def test_what_is_not_wanted_is_not_gathered(models, examples):
    (gathered_pass,) = gathered(models["llama"], DPO(), examples, gradients=False, inputs=False)
    assert not gathered_pass.gradients and not gathered_pass.inputs and len(gathered_pass.upstream) == 4
    (gathered_pass,) = gathered(models["llama"], DPO(), examples, upstream=False, gradients=False)
    assert not gathered_pass.upstream and len(gathered_pass.inputs) == 4


def test_the_model_and_its_weights_are_left_as_they_were(models, examples):
    model = models["gpt_neox"]
    before = weights(model)
    forward = model.network.forward
    gathered(model, DPO(), examples)
    assert_close(dict(model.network.named_parameters()), before, rtol=0, atol=0)
    assert model.network.forward == forward  # TRL patches the network that it is given
    assert not any(module._forward_hooks for module in model.network.modules())


def test_diverged_weights_are_refused(models, examples):
    model = models["gpt_neox"]
    params = weights(model)
    norm = "gpt_neox.layers.1.post_attention_layernorm.weight"
    params[norm] = params[norm] * float("nan")
    with pytest.raises(ValueError, match="is not finite: the weights have diverged"):
        list(gradient_moments(model, params, DPO(), TRAINING, examples, Gathering(prompts=4), seed=0))


@pytest.mark.parametrize("positions", ["scored", "all"])
@pytest.mark.parametrize("objective", [CE("chosen"), DPO()], ids=["ce", "dpo"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_by_prompt_a_sample_is_the_mean_read_and_the_sum_sent_back_over_all_its_responses(
    models, architecture, objective, positions, examples, tmp_path
):
    model = models[architecture]
    (gathered_pass,) = gathered(model, objective, examples, unit="prompt", positions=positions, groups=3)
    scored, attention, read, sent, _ = by_autograd(model, objective, examples, tmp_path)
    where = attention
    if positions == "scored":
        where = torch.zeros_like(attention)
        where[:, :-1] = scored.targets[:, 1:]
    terms, prompts = sum(scored.terms), torch.tensor(scored.prompt)

    def of_prompt(values, prompt):
        return values[prompts == prompt][where[prompts == prompt]]

    for site, moment in gathered_pass.inputs.items():
        means = torch.stack([of_prompt(read[site.module], prompt).mean(0) for prompt in range(6)])
        assert moment.samples == 6
        assert_close(moment.value, means.T @ means / 6, rtol=1e-4, atol=1e-4)
        assert_close(moment.mean, means.mean(0), rtol=1e-4, atol=1e-5)
    matrices = {matrix.name: matrix for matrix in model.architecture.matrices}
    for name, moment in gathered_pass.upstream.items():
        delta = sent[matrices[name].module] * terms
        sums = torch.stack([of_prompt(delta, prompt).sum(0) for prompt in range(6)])
        expected = sums.T @ sums / 6
        assert_close(moment.value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_only_some_of_the_data_is_tokenized_and_another_seed_draws_others(examples):

    drawn, same_again, other = (sampled(examples, 2, 4, seed) for seed in (0, 0, 1))
    assert drawn == same_again != other
    assert len(drawn.pairs) == 8 and sum(map(len, drawn.text[:-1])) < 80 <= sum(map(len, drawn.text))
    assert replace(drawn, text=examples.text, pairs=examples.pairs) == examples
