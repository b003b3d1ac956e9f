import pytest
import torch
from networks import FORMS, language_model
from torch.testing import assert_close

from weightgeom.estimators import moments
from weightgeom.estimators.moments import activation_moments
from weightgeom.estimators.walk import Walk
from weightgeom.text.tokens import packed


def gathered(model, params, batches, **options):
    sites = [*model.architecture.sites, model.architecture.final_site]
    return list(activation_moments(model, params, batches, sites, groups=3, **options))


@pytest.mark.parametrize("name", FORMS)
def test_moments_of_some_layers_at_a_time_are_those_of_one_pass(name, tokenizer, examples, monkeypatch):
    model, params = language_model(name, tokenizer)
    batches = packed(examples.heldout, tokenizer, length=24, limit=200, size=4)
    assert len(batches) > 1
    whole = gathered(model, params, batches)
    embedded, passed = [], []
    embedding = model.network.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda *_: embedded.append(1))
    body = model.network.register_forward_pre_hook(lambda *_: passed.append(1))
    monkeypatch.setattr(moments, "SUMS", 1.0)  # a site at a time
    walked = gathered(model, params, batches)
    hook.remove()
    body.remove()
    assert len(passed) == len(walked) * len(batches) and len(embedded) == len(batches)
    assert model.network.get_input_embeddings() is embedding
    for (site, moment), (same, expected) in zip(whole, walked, strict=True):
        assert site == same
        assert_close(moment.sums, expected.sums, rtol=0, atol=0)
        assert_close(moment.counts, expected.counts, rtol=0, atol=0)


def test_every_layer_runs_once_though_the_sites_are_split(tokenizer, examples, monkeypatch):
    model, params = language_model("llama", tokenizer)
    batches = packed(examples.heldout, tokenizer, length=24, limit=200, size=4)
    runs = []
    for layer in model.network.model.layers:
        layer.mlp.register_forward_hook(lambda module, *_: runs.append(module))
    gathered(model, params, batches)
    once = len(runs)
    d = model.architecture.d_model
    monkeypatch.setattr(moments, "SUMS", 2.0 * 3 * 4 * d**2)  # the two sites of a layer, three groups each
    gathered(model, params, batches)
    assert once == len(runs) - once == len(model.network.model.layers) * len(batches)


def test_a_walk_leaves_the_network_as_it_was(tokenizer, examples, monkeypatch):
    model, params = language_model("llama", tokenizer)
    batch = packed(examples.heldout, tokenizer, length=24, limit=200, size=4)[0]
    before = model.logits(params, batch)
    monkeypatch.setattr(moments, "SUMS", 1.0)
    gathered(model, params, [batch])
    assert_close(model.logits(params, batch), before, rtol=0, atol=0)


def test_there_is_no_walk_over_sites_that_are_not_in_order(tokenizer):
    model, _ = language_model("llama", tokenizer)
    sites = model.architecture.sites
    assert Walk.through(model.network, sites) is not None
    assert Walk.through(model.network, sites[::-1]) is None


def test_with_little_for_the_hidden_states_passes_start_at_the_embedding(tokenizer, examples):
    model, params = language_model("llama", tokenizer)
    batches = packed(examples.heldout, tokenizer, length=24, limit=200, size=4)
    runs = []
    first = model.network.model.layers[0]
    first.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        whole, split = gathered(model, params, batches), gathered(model, params, batches, budget_gb=1e-9)
    for (_, moment), (_, expected) in zip(whole, split, strict=True):
        assert_close(moment.sums, expected.sums, rtol=0, atol=0)
