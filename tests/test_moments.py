from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from weightgeom.moments import activation_moments
from weightgeom.tokens import packed, responses


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
    moments, tokens = activation_moments(model, params, batches, model.architecture.sites)
    assert tokens == sum(int(batch.attention_mask.sum()) for batch in batches)
    assert moments.keys() == expected.keys() == set(model.architecture.sites)
    for site, a in expected.items():
        assert len(a) == tokens
        close(moments[site].double(), a.T @ a / tokens)


def test_centred_moments_are_the_covariance(model, params, batches):
    moments, _ = activation_moments(model, params, batches, model.architecture.sites, centre=True)
    for site, a in cached(model, batches).items():
        close(moments[site].double(), torch.cov(a.T, correction=0))
        assert a.mean(0).abs().max() > 0.1  # otherwise centring would show nothing


@pytest.mark.parametrize("centre", [False, True])
def test_moments_do_not_depend_on_the_batch_size(model, params, examples, centre):
    sites = model.architecture.sites
    one, other = (
        activation_moments(
            model, params, packed(examples.heldout, model.tokenizer, 24, 300, size), sites, centre=centre
        )
        for size in (1, 16)
    )
    assert one[1] == other[1]
    for site in sites:
        close(one[0][site], other[0][site])


def test_moments_do_not_depend_on_the_padding(model, params, examples):
    sites = model.architecture.sites
    (batch,) = (chosen for chosen, _ in responses(examples.heldout_pairs, model.tokenizer, 64))
    assert (batch.attention_mask == 0).any()
    moments, tokens = activation_moments(model, params, [batch], sites)
    junk = torch.where(batch.attention_mask.bool(), batch.input_ids, 7)
    other, same = activation_moments(model, params, [replace(batch, input_ids=junk)], sites)
    assert tokens == same == int(batch.attention_mask.sum())
    for site in sites:
        close(moments[site], other[site])


def test_measuring_leaves_no_hook_behind(model, params, batches):
    for weights in (params, params | {"lm_head.weight": torch.zeros(1, 1)}):  # the second one fails
        try:
            activation_moments(model, weights, batches, model.architecture.sites)
        except RuntimeError:
            pass
        assert not any(module._forward_pre_hooks for module in model.network.modules())


def test_diverged_weights_are_refused(model, params, batches):
    norm = "gpt_neox.layers.1.post_attention_layernorm.weight"
    params[norm] = params[norm] * float("nan")
    message = "the mlp_input of layer 1 is not finite: the weights have diverged"
    with pytest.raises(ValueError, match=message):
        activation_moments(model, params, batches, model.architecture.sites)
