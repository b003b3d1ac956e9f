from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from weightgeom.estimators import moments
from weightgeom.estimators.moments import Moment, activation_moments, passes
from weightgeom.geometry.subspace import Subspace
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.text.tokens import Batch, packed, responses


@pytest.fixture
def batches(model, examples):
    return packed(examples.heldout, model.tokenizer, length=24, limit=300)


def cached(model, batches):
    """All activations of every site in fp64, from the network's own weights and without padding."""
    activations = {site: [] for site in model.architecture.sites}
    hooks = [
        model.network.get_submodule(site.module).register_forward_hook(
            lambda module, inputs, output, site=site: activations[site].append(inputs[0][0].double())
        )
        for site in activations
    ]
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            model.network(input_ids=ids[None, : int(mask.sum())])
    for hook in hooks:
        hook.remove()
    return {site: torch.cat(parts) for site, parts in activations.items()}


def close(actual, expected):
    # fp32 sums of 300 products of order 1: 1e-7 relative each, with the network's own rounding.
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_the_cached_activations(model, params, batches):
    expected = cached(model, batches)
    moments = dict(activation_moments(model, params, batches, model.architecture.sites))
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    assert moments.keys() == expected.keys() == set(model.architecture.sites)
    for site, a in expected.items():
        assert len(a) == tokens == moments[site].samples
        close(moments[site].value.double(), a.T @ a / tokens)


def test_centred_moments_are_the_covariance(model, params, batches):
    moments = dict(activation_moments(model, params, batches, model.architecture.sites, centre=True))
    for site, a in cached(model, batches).items():
        close(moments[site].value.double(), torch.cov(a.T, correction=0))
        assert a.mean(0).abs().max() > 0.1  # otherwise centring would show nothing


OPTIONS = {
    "plain": {},
    "centred": {"centre": True},
    "in groups": {"groups": 5},
    "by prompt, centred, in groups": {"unit": "prompt", "centre": True, "groups": 5},
    "fp64": {"dtype": torch.float64},
}


def values(model, params, batches, **options):
    moments = activation_moments(model, params, batches, model.architecture.sites, **options)
    return {site: moment.value for site, moment in moments}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_moments_do_not_depend_on_the_batch_size(model, params, examples, options):
    by_1, by_16 = (
        values(model, params, packed(examples.heldout, model.tokenizer, 24, 300, size), **options)
        for size in (1, 16)
    )
    for site in model.architecture.sites:
        close(by_1[site], by_16[site])


def left_padded(batch: Batch) -> Batch:
    """The same sequences with the padding in front."""
    ids, mask, target = batch.input_ids.clone(), batch.attention_mask.clone(), batch.target.clone()
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        for tensor in (ids, mask, target):
            tensor[row] = tensor[row].roll(tensor.shape[1] - length)
    return Batch(ids, mask, target)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("network", ["gpt_neox", "gpt2"])  # rotary and learned positions
def test_moments_depend_neither_on_the_padding_nor_on_its_side(network, networks, examples, options):
    model, params = networks[network]
    (batch,) = (chosen for chosen, _ in responses(examples.heldout_pairs, model.tokenizer, 64))
    assert (batch.attention_mask == 0).any()
    right, left = (values(model, params, [side], **options) for side in (batch, left_padded(batch)))
    junk = replace(batch, input_ids=torch.where(batch.attention_mask.bool(), batch.input_ids, 7))
    for site, value in values(model, params, [junk], **options).items():
        close(value, right[site])
        close(left[site], right[site])


@pytest.fixture(scope="module")
def networks(model, tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    )
    other = LanguageModel(GPT2LMHeadModel(config).eval(), tokenizer, architecture_of(config))
    return {
        "gpt_neox": (model, dict(model.network.named_parameters())),
        "gpt2": (other, {name: weight.detach() for name, weight in other.network.named_parameters()}),
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_budget_gives_identical_moments_in_more_passes(model, params, batches, options, monkeypatch):
    whole = values(model, params, batches, **options)
    runs = []
    logits = LanguageModel.logits
    monkeypatch.setattr(
        LanguageModel, "logits", lambda *given, **named: runs.append(1) or logits(*given, **named)
    )
    split = values(model, params, batches, budget_gb=1e-9, **options)
    assert len(runs) == len(model.architecture.sites) * len(batches)
    for site, value in whole.items():
        assert_close(split[site], value, rtol=0, atol=0)


def test_weights_beyond_the_budget_are_read_when_their_module_runs(model, params, batches):
    read = []

    class Lazy(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    moments = values(model, Lazy(params), batches, budget_gb=1e-9)
    first, last = (
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.layers.1.mlp.dense_h_to_4h.weight",
    )
    # Four sites, a pass each: those of layer 1 and the mlp input of layer 0 need the first matrix.
    assert read.count(first) == 3 * len(batches) and last not in read
    whole = values(model, params, batches)
    for site, value in whole.items():
        assert_close(moments[site], value, rtol=0, atol=0)


def test_a_pass_ends_at_its_last_site(model, params, batches):
    ran = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
        for name, module in model.network.named_modules()
    ]
    list(activation_moments(model, params, batches[:1], model.architecture.sites[:2]))
    for hook in hooks:
        hook.remove()
    # The sites are what q and up of layer 0 read, up's being the last in a parallel block.
    assert "gpt_neox.layers.0.attention.query_key_value" in ran
    assert not {"gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.1", "lm_head"} & set(ran)


def test_the_moment_of_a_drawn_sample_is_that_of_the_tokens_it_holds(model, params, batches):
    expected = cached(model, batches)
    lengths = torch.cat([batch.attention_mask.sum(1) for batch in batches])
    groups = torch.arange(len(lengths)) * 3 // len(lengths)
    of_tokens = groups.repeat_interleave(lengths)
    for centre in (False, True):
        moments = activation_moments(
            model, params, batches, model.architecture.sites, groups=3, centre=centre
        )
        for site, moment in moments:
            a = torch.cat([expected[site][of_tokens == 0]] * 2 + [expected[site][of_tokens == 2]])
            times = torch.tensor([2.0, 0.0, 1.0])
            close(moment.drawn(times).double(), torch.cov(a.T, correction=0) if centre else a.T @ a / len(a))


def test_passes_take_neighbours_as_long_as_they_fit():
    assert list(passes([3, 3, 3, 9, 1, 1], float, 6.0)) == [[3, 3], [3], [9], [1, 1]]


def test_measuring_leaves_no_hook_behind(model, params, batches):
    for weights in (params, params | {"gpt_neox.embed_in.weight": torch.zeros(1, 1)}):  # the second one fails
        with suppress(IndexError):
            list(activation_moments(model, weights, batches, model.architecture.sites))
        assert not any(module._forward_pre_hooks for module in model.network.modules())


def test_packed_groups_have_the_moment_the_halves_and_nearly_the_bootstrap_of_whole_ones(
    model, params, batches, monkeypatch
):
    options = {"groups": 5, "centre": False}
    whole = dict(activation_moments(model, params, batches, model.architecture.sites, **options))
    monkeypatch.setattr(moments, "UNPACKED", 0.0)
    packed_ones = activation_moments(model, params, batches, model.architecture.sites, **options)
    for site, moment in packed_ones:
        expected = whole[site]
        assert moment.packed is not None and len(moment.packed) == 5 and len(moment.sums) == 2
        assert_close(moment.value, expected.value, rtol=1e-5, atol=1e-6)
        assert_close(moment.traces, expected.traces, rtol=1e-5, atol=0)
        halves, expected_halves = moment.halves(), expected.halves()
        assert halves is not None and expected_halves is not None
        for half, expected_half in zip(halves, expected_halves, strict=True):
            assert half.samples == expected_half.samples
            assert_close(half.value, expected_half.value, rtol=1e-5, atol=1e-6)
        for unpacked, total in zip(moment.sums_of_groups, expected.sums, strict=True):
            scale = total.diagonal().sqrt()
            assert ((unpacked - total).abs() <= torch.outer(scale, scale) * 2**-11).all()
            assert torch.equal(unpacked, unpacked.T) and not torch.equal(unpacked, total)
        space = Subspace.random(len(moment.value), 6, torch.Generator().manual_seed(0))
        drawn, exact = (each.resampled_levels(space, 9, 1)[:, -1] for each in (moment, expected))
        assert (drawn - exact).abs().max() < 0.01 * exact.std()
        tops, exact_tops = (each.resampled_tops(6, 40, 1) for each in (moment, expected))
        assert tops is not None and exact_tops is not None
        inside, exact = tops.shares.sum(1), exact_tops.shares.sum(1)
        assert (inside - exact).abs().max() < 0.02 * exact.std()
        (again,) = moment.resampled(1, 3)  # the groups are still there, as adapters need them
        (whole_again,) = expected.resampled(1, 3)
        assert_close(again, whole_again, rtol=1e-2, atol=1e-2 * float(whole_again.abs().max()))
        dropping = moment.resampled_tops(6, 40, 1, drop=True)
        assert dropping is not None and torch.equal(dropping.shares, tops.shares) and not moment.packed


def test_diverged_weights_are_refused(model, params, batches):
    norm = "gpt_neox.layers.1.post_attention_layernorm.weight"
    params[norm] = params[norm] * float("nan")
    message = "the mlp_input of layer 1 is not finite: the weights have diverged"
    with pytest.raises(ValueError, match=message):
        list(activation_moments(model, params, batches, model.architecture.sites))


def test_resampled_levels_are_the_shares_of_every_resampled_moment(model, params, batches):
    moments = activation_moments(model, params, batches, model.architecture.sites[:2], groups=4)
    for _, moment in moments:
        space = Subspace.random(moment.sums.shape[1], 6, torch.Generator().manual_seed(0))
        levels = moment.resampled_levels(space, 9, 1)
        expected = torch.stack([space.shares(sample).cumsum(0) for sample in moment.resampled(9, 1)])
        assert_close(levels, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [0.2, 0.5])
def test_directions_of_resampled_moments_are_the_exact_ones_within_a_fraction_of_their_spread(decay):
    generator, d, k, groups = torch.Generator().manual_seed(0), 320, 40, 8
    scale = torch.arange(1, d + 1) ** -decay
    parts = [torch.randn(8 * d, d, generator=generator) * scale for _ in range(groups)]
    sums = torch.stack([part.T @ part for part in parts])
    moment = Moment(sums, torch.stack([part.sum(0) for part in parts]), torch.full((groups,), 8.0 * d))
    x = torch.randn(40, d, generator=generator) * scale
    gram = x.T @ x
    resampled = moment.resampled_tops(k, 40, 1)
    assert resampled is not None
    exact = [Subspace.top(sample, k) for sample in moment.resampled(40, 1)]
    shares = torch.tensor([space.explained(gram) for space in exact], dtype=torch.float64)
    explained = resampled.explained(gram)[:, -1]
    # The standard error of 40 samples has an error of 1/sqrt(80) = 11 %.
    assert abs(float(explained.std() / shares.std()) - 1) < 0.05
    assert float((explained - shares).square().mean().sqrt()) < 0.15 * float(shares.std())
    levels = [space.explained(sample) for space, sample in zip(exact, moment.resampled(40, 1), strict=True)]
    levels = torch.tensor(levels, dtype=torch.float64)
    assert float((resampled.shares.sum(1) - levels).abs().max()) < 0.1 * float(levels.std())
