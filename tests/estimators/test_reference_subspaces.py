"""Frames of what a model reads and predicts, against SVDs of what is cached."""

from dataclasses import replace

import pytest
import torch
from networks import FORMS, language_model
from torch.testing import assert_close

from weightgeom.estimators.moments import Moment
from weightgeom.estimators.reference_subspaces import (
    Inputs,
    Place,
    check_dimensions,
    dimensions,
    input_frames,
    place_of,
    prediction_frame,
    random_frame,
)
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting

D, K, SEED, LENGTH = 32, 4, 3, 24
INPUTS = Inputs(length=LENGTH)


@pytest.fixture
def at(tokenizer, examples):
    """A setting at a network of an architecture."""

    def setting(name) -> Setting:
        model, params = language_model(name, tokenizer)
        return Setting(model, params, params, False, examples, SEED)

    return setting


def frames(setting, inputs=INPUTS, k=K):
    return list(input_frames(setting, setting.start, k, inputs))


def cached(setting, limit=None):
    """The inputs at every site, a sequence at a time, in fp64 by the place's name and layer."""
    model = setting.model
    tokens = [
        token
        for text in setting.examples.heldout
        for token in [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]
    ][:limit]
    seen: dict[Place, list] = {(site.name, site.layer): [] for site in model.architecture.sites}
    hooks = [
        model.network.get_submodule(site.module).register_forward_hook(
            lambda module, read, output, into=seen[site.name, site.layer]: into.append(
                read[0].reshape(-1, D).double()
            )
        )
        for site in model.architecture.sites
    ]
    for start in range(0, len(tokens), LENGTH):
        if len(part := tokens[start : start + LENGTH]) > 1:
            model.network(input_ids=torch.tensor([part]))
    for hook in hooks:
        hook.remove()
    return seen


def top(rows, k=K):
    """Top right singular vectors, strongest first."""
    return torch.linalg.svd(rows, full_matrices=False)[2][:k].T


def same_directions(basis, expected):
    """Each direction is the other's up to its sign."""
    # fp32 activations: turned by 1e-6 over the relative gap of the spectrum.
    assert_close((basis.T @ expected).abs(), torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_input_frames_are_the_singular_vectors_of_the_cached_activations_in_the_order_of_the_layers(
    name, centre, at
):
    setting = at(name)
    measured = frames(setting, replace(INPUTS, centre=centre))
    seen = cached(setting)
    assert [frame.place for frame in measured] == [
        (name, layer) for layer in (0, 1) for name in ("attention_input", "mlp_input")
    ]
    for frame in measured:
        a = torch.cat(seen[frame.place])
        same_directions(frame.space.basis, top(a - a.mean(0) if centre else a))
        assert frame.moment is not None and frame.moment.samples == len(a)


def test_a_frame_over_many_batches_is_that_of_its_sequences_one_at_a_time(at, examples):
    setting = replace(at("llama"), examples=replace(examples, heldout=[*examples.text] * 10))
    seen = cached(setting)
    for frame in frames(setting):
        a = torch.cat(seen[frame.place])
        assert frame.moment is not None and frame.moment.samples == len(a) > 3 * 2048  # tokens of a batch
        same_directions(frame.space.basis, top(a))


def test_by_prompt_the_frame_is_that_of_the_means_of_the_sequences(at):
    setting = at("llama")
    seen = cached(setting)
    for frame in frames(setting, replace(INPUTS, unit="prompt")):
        means = torch.stack([states.mean(0) for states in seen[frame.place]])
        same_directions(frame.space.basis, top(means))
        assert frame.moment is not None and frame.moment.samples == len(means)


def test_tokens_say_how_much_of_the_held_out_text_is_read(at):
    setting = at("gpt2")
    seen = cached(setting, limit=75)
    for frame in frames(setting, replace(INPUTS, tokens=75)):
        a = torch.cat(seen[frame.place])
        assert frame.moment is not None and frame.moment.samples == len(a) == 75
        same_directions(frame.space.basis, top(a))


def test_frames_are_of_the_weights_that_are_given_and_not_of_the_networks_own(at):
    setting = at("llama")
    generator = torch.Generator().manual_seed(5)
    other = {
        name: weight + torch.randn(weight.shape, generator=generator)
        for name, weight in setting.start.items()
    }
    measured = list(input_frames(setting, other, K, INPUTS))
    setting.model.network.load_state_dict(other, strict=False)
    seen = cached(setting)
    for frame in measured:
        same_directions(frame.space.basis, top(torch.cat(seen[frame.place])))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_the_prediction_frame_is_that_of_the_unembedding_behind_the_final_norm(name, fold, centre, at):
    setting = at(name)
    network = setting.model.network
    unembedding = network.get_output_embeddings().weight.double()
    if fold:
        unembedding = unembedding * setting.model.architecture.final_norm.gain(setting.start).double()
    rows = unembedding - unembedding.mean(0) if centre else unembedding
    frame = prediction_frame(setting, setting.start, K, fold_gain=fold, centre=centre)
    assert frame.place == ("prediction", None) and frame.moment is None and frame.resampled is None
    # The gain is 1 + weight in fp32: 6e-8 over the gaps of a random spectrum, some percent.
    assert_close((frame.space.basis.T @ top(rows)).abs(), torch.eye(K).double(), rtol=0, atol=1e-5)


def test_the_unembedding_is_folded_and_centred_by_default(at):
    setting = at("llama")
    default, explicit = (
        prediction_frame(setting, setting.start, K, **options).space.basis
        for options in ({}, {"fold_gain": True, "centre": True})
    )
    assert_close(default, explicit, rtol=0, atol=0)


def test_the_random_frame_is_drawn_by_the_seed_alone(at):
    setting = at("llama")
    frame, elsewhere, other = (
        random_frame(place, K) for place in (setting, at("gpt2"), replace(setting, seed=SEED + 1))
    )
    assert frame.place == ("random", None) and frame.moment is None
    assert_close(frame.space.basis, elsewhere.space.basis, rtol=0, atol=0)
    assert_close(frame.space.basis.T @ frame.space.basis, torch.eye(K).double())
    assert (frame.space.basis - other.space.basis).abs().max() > 0.1


def test_resampled_frames_are_those_of_the_moments_own_bootstrap(at):
    setting = at("llama")
    for frame in frames(setting, replace(INPUTS, groups=5, resamples=7)):
        assert isinstance(frame.moment, Moment) and len(frame.moment.sums) == 5
        assert frame.resampled is not None and len(frame.resampled) == 7
        assert_close(frame.space.basis, Subspace.top(frame.moment.value, K).basis, rtol=0, atol=1e-10)
        distances = [
            (space.basis @ space.basis.T - frame.space.basis @ frame.space.basis.T).norm()
            for space, _ in frame.resampled
        ]
        assert min(distances) > 1e-3  # each of them is another subspace


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [8, 4])
def test_resampled_subspaces_are_the_top_ones_of_each_sample(k, centred, at):
    setting = at("llama")
    inputs = replace(INPUTS, groups=5, resamples=7, centre=centred)
    for frame in input_frames(setting, setting.start, k, inputs):
        assert isinstance(frame.moment, Moment) and frame.resampled is not None
        samples = frame.moment.resampled(7, SEED)
        for (space, shares), sample in zip(frame.resampled, samples, strict=True):
            whole = Subspace.top(sample, k)
            apart = float((space.basis @ space.basis.T - whole.basis @ whole.basis.T).norm())
            moved = float((space.basis @ space.basis.T - frame.space.basis @ frame.space.basis.T).norm())
            assert apart < 1e-4 < moved  # the moments are sums in fp32
            explained, expected = shares.cumsum(0), whole.shares(sample).cumsum(0)
            assert_close(explained[-1], expected[-1], rtol=1e-5, atol=1e-6)


def test_without_resamples_there_is_one_group_and_nothing_resampled(at):
    for frame in frames(at("llama"), replace(INPUTS, groups=5)):
        assert isinstance(frame.moment, Moment) and len(frame.moment.sums) == 1 and frame.resampled is None


@pytest.mark.parametrize("resamples", [0, 4])
def test_a_budget_changes_no_frame(resamples, at):
    setting = at("olmo2")
    whole, split = (
        frames(setting, replace(INPUTS, resamples=resamples, budget_gb=budget)) for budget in (None, 1e-9)
    )
    assert [frame.place for frame in whole] == [frame.place for frame in split]
    for of_whole, of_split in zip(whole, split, strict=True):
        assert_close(of_whole.space.basis, of_split.space.basis, rtol=0, atol=0)
        if of_whole.resampled is None or of_split.resampled is None:
            assert of_whole.resampled is of_split.resampled
            continue
        for drawn, again in zip(of_whole.resampled, of_split.resampled, strict=True):
            assert_close(drawn[0].basis, again[0].basis, rtol=0, atol=0)
            assert_close(drawn[1], again[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_a_matrix_is_compared_at_its_own_input_or_with_the_prediction(name, at):
    matrices = at(name).model.architecture.matrices
    expected = {"gate": "mlp_input", "up": "mlp_input", "o": "prediction", "down": "prediction"}
    for matrix in matrices:
        site = expected.get(matrix.kind, "attention_input")
        assert place_of(matrix) == (site, None if site == "prediction" else matrix.layer)


@pytest.mark.parametrize(
    ("k", "d", "expected"),
    [
        (None, 32, [4]),  # an eighth
        (None, 100, [12]),
        (None, 5, [1]),  # at least one
        (7, 32, [7]),
        ([8, 2, 8], 32, [2, 8]),
        ([], 32, []),
    ],
)
def test_dimensions_are_those_asked_for_in_order_once_each_or_an_eighth(k, d, expected):
    assert dimensions(k, d) == expected


@pytest.mark.parametrize("k", [None, 1, 32, [1, 32]])
def test_a_k_that_fits_is_let_through(k):
    check_dimensions(k, 32, "probe.x.k")


@pytest.mark.parametrize("k", [0, -1, 33, [4, 33], [0, 4], []])
def test_a_k_that_does_not_fit_is_refused_by_the_name_of_its_key(k):
    message = r"probe\.x\.k must be 1 to 32, the width of the residual stream, got "
    with pytest.raises(ValueError, match=message):
        check_dimensions(k, 32, "probe.x.k")
