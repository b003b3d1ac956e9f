"""The inputs of experts: of the tokens that the router sends to each, and of no others."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import logging

import pytest
import torch
from networks import MIXTURES, language_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from weightgeom.data.world import World
from weightgeom.estimators import reference_subspaces
from weightgeom.estimators.moments import activation_moments
from weightgeom.estimators.reference_subspaces import Inputs, input_frames, place_of, routed_place_of
from weightgeom.interfaces import Setting
from weightgeom.models.experts import routed_rows, unstacked
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of, expert_sites
from weightgeom.probes.rsf import RSF
from weightgeom.table import tabulate
from weightgeom.text.tokens import packed

WORLD = World(entities=20, heldout_entities=4, values=5, documents=40, pairs=24, heldout=30)
EXAMPLES = WORLD.examples()
D = 32


@pytest.fixture(scope="module")
def tokenizer():
    return WORLD.tokenizer()


def matrix_of(model, name):
    return next(matrix for matrix in model.architecture.matrices if matrix.name == name)


@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "deepseek_v3_full_q"])
def test_the_moment_of_an_expert_is_that_of_the_tokens_that_it_acts_on(name, tokenizer):
    model, params = language_model(name, tokenizer)
    params = unstacked(params, model.architecture.stacks)
    batches = packed(EXAMPLES.heldout, tokenizer, 24, 300)
    assert not all(bool(batch.attention_mask.all()) for batch in batches)  # padding has no part in it
    sites = expert_sites(model.architecture.matrices)
    moments = dict(activation_moments(model, params, batches, sites, groups=3))
    seen: dict[str, list] = {site.module.rpartition(".")[0]: [] for site in sites}
    hooks = [
        model.network.get_submodule(block).register_forward_hook(
            lambda module, given, output, block=block: seen[block].append((given[0], output))
        )
        for block in seen
    ]

    def flows(weights) -> dict[str, tuple[torch.Tensor, ...]]:
        """The inputs and outputs of the blocks, of all tokens but padding."""
        for kept in seen.values():
            kept.clear()
        for batch in batches:
            model.logits(model.hold(weights), batch)
        masks = [batch.attention_mask.bool() for batch in batches]

        def rows(tensors) -> torch.Tensor:
            wholes = [tensor[0] if isinstance(tensor, tuple) else tensor for tensor in tensors]
            return torch.cat(
                [whole.reshape(*mask.shape, D)[mask] for whole, mask in zip(wholes, masks, strict=True)]
            )

        return {block: tuple(rows(side) for side in zip(*kept, strict=True)) for block, kept in seen.items()}

    whole = flows(params)
    assert {site.layer for site in sites} == {site.layer for site in moments}
    for site in sites:
        block = site.module.rpartition(".")[0]
        down = matrix_of(model, f"L{site.layer}.down.{site.expert}")
        a, output = whole[block]
        without = flows(down.replaced(params, torch.zeros_like(down.of(params))))[block][1]
        acted = (output - without).abs().amax(1) > 1e-7
        read = a[acted].double()
        if name == "llama4_text":  # its expert reads the input times the router's score
            router = matrix_of(model, f"L{site.layer}.router").of(params)[site.expert]
            read = read * torch.sigmoid(read @ router.double())[:, None]
        moment = moments[site]
        assert 0 < moment.samples == len(read) < len(a)
        assert_close(moment.value.double(), read.T @ read / len(read), rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_a_budget_and_groups_change_no_moment_of_an_expert(tokenizer):
    model, params = language_model("qwen3_moe", tokenizer)
    batches = packed(EXAMPLES.heldout, tokenizer, 24, 600)
    sites = (*model.architecture.sites, *expert_sites(model.architecture.matrices))
    whole = dict(activation_moments(model, params, batches, sites))
    for site, moment in activation_moments(model, params, batches, sites, groups=4, budget_gb=1e-6):
        assert_close(moment.value, whole[site].value, rtol=1e-4, atol=1e-6)
        assert moment.samples == whole[site].samples
    # Two of three experts are chosen for every token.
    tokens = [moment.samples for site, moment in whole.items() if site.expert is not None]
    assert sum(tokens) == 2 * whole[model.architecture.sites[0]].samples


EVEN, ODD = torch.eye(D)[0], torch.eye(D)[16]


def of_two_kinds(tokenizer):
    """A mixture of two experts whose router sends every token with an even number to the first.

    The inputs of these lie in the first 16 coordinates, those of the others in the last 16.
    """
    config = MIXTURES["qwen3_moe"](len(tokenizer), 128)
    config.num_experts, config.num_experts_per_tok = 2, 1
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = LanguageModel(network, tokenizer, architecture_of(config))
    params = unstacked({**network.state_dict()}, model.architecture.stacks)
    embed = torch.randn(params[model.architecture.embed].shape)
    odd = torch.arange(len(embed)) % 2
    embed[:, 0], embed[:, 16] = 1, 1  # times the mask: what the router looks at
    half = torch.arange(D) >= 16
    params[model.architecture.embed] = embed * (half == odd[:, None].bool())
    for matrix in model.architecture.matrices:
        if matrix.role == "write":  # the stream is the embedding alone
            params = matrix.replaced(params, torch.zeros_like(matrix.of(params)))
    return model, matrix_of(model, "L0.router").replaced(params, torch.stack([EVEN, ODD]))


def test_experts_whose_tokens_lie_in_different_subspaces_have_these_for_their_own(tokenizer):
    model, params = of_two_kinds(tokenizer)
    generator = torch.Generator().manual_seed(0)
    after = params
    for name in ("L0.up.0", "L0.gate.0", "L0.up.1", "L0.gate.1"):
        matrix = matrix_of(model, name)
        noise = torch.randn(matrix.of(params).shape, generator=generator) * (torch.arange(D) < 16)
        after = matrix.replaced(after, matrix.of(params) + noise)
    setting = Setting(model, params, after, False, EXAMPLES, 0)
    rows = RSF(k=8, tokens=2048, resamples=8).measurement(setting)(after)
    table = tabulate({"step": 1, **row} for row in rows)
    reads = table[(table["role"] == "read") & (table["subspace"] != "random") & table["expert"].notna()]
    ratio = reads[reads["quantity"] == "ratio"].groupby("expert")["value"]
    # All of both updates lies in the 16 coordinates of the first expert's tokens. Its 8 directions are some
    # of these, and an update of iid entries there has half of its energy in 8: 0.5 d/k = 2. The second: 0.
    assert len(ratio.get_group(0)) == 2 and all(1 < value < 3 for value in ratio.get_group(0))
    assert_close(ratio.get_group(1).to_list(), [0.0, 0.0], rtol=0, atol=1e-5)
    frames = {
        frame.place: frame
        for frame in input_frames(setting, params, 8, Inputs(tokens=2048, experts=True))
        if frame.place[:2] == ("mlp_input", 0)
    }
    assert list(frames) == [("mlp_input", 0), ("mlp_input", 0, 0), ("mlp_input", 0, 1)]
    of_layer, first, second = (frame.space.basis[:16].square().sum() / 8 for frame in frames.values())
    assert_close(torch.stack([first, second]), torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-6)
    assert 0.1 < float(of_layer) < 0.9  # the subspace of both experts' tokens together is that of neither
    tokens = reads[reads["quantity"] == "tokens_per_dimension"].groupby("expert")["n"].first().to_list()
    moments = [frame.moment for frame in frames.values() if frame.moment is not None]
    assert [moment.samples for moment in moments] == [sum(tokens), *tokens]


def test_experts_with_few_tokens_are_named_once_and_those_with_none_have_sizes_alone(tokenizer, caplog):
    model, params = of_two_kinds(tokenizer)
    router = matrix_of(model, "L0.router")
    params = router.replaced(params, torch.stack([EVEN + ODD, -EVEN - ODD]))  # all go to the first
    after = {name: value + 0.1 for name, value in params.items()}
    reference_subspaces._warn_of_few_routed.cache_clear()
    reference_subspaces._warn_of_unreached.cache_clear()
    setting = Setting(model, params, after, False, EXAMPLES, 0)
    with caplog.at_level(logging.WARNING):
        rows, _ = (RSF(tokens=200, resamples=8).measurement(setting)(after) for _ in range(2))
    of_expert = {
        expert: {row["quantity"] for row in rows if row.get("role") == "read" and row.get("expert") == expert}
        for expert in (0, 1)
    }
    assert of_expert[1] == {"delta_norm", "moved_share"}
    assert {"ratio", "ratio_low", "tokens_per_dimension"} < of_expert[0]
    messages = [record.getMessage() for record in caplog.records if "experts get" in record.getMessage()]
    assert len(messages) == 2
    assert "1 of 2 experts get fewer than 16 tokens per dimension, the fewest 6.2 (expert 0" in messages[0]
    assert "1 of 2 experts get no token of the held-out text" in messages[1]


def test_places_of_experts_are_their_own_on_the_read_side_alone(tokenizer):
    model, _ = language_model("qwen3_moe", tokenizer)
    assert routed_place_of(matrix_of(model, "L0.up.2")) == ("mlp_input", 0, 2)
    for name in ("L0.router", "L0.down.2", "L1.up", "L0.q"):
        assert routed_place_of(matrix_of(model, name)) == place_of(matrix_of(model, name))
    assert place_of(matrix_of(model, "L0.up.2")) == ("mlp_input", 0)


def test_inputs_of_another_form_are_refused():
    a = torch.zeros(6, 4)
    with pytest.raises(NotImplementedError, match="called with 2 inputs of an unknown form"):
        routed_rows((a, torch.zeros(6, 2)), 3)
