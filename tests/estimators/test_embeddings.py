import networks
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from weightgeom.estimators.reference_subspaces import FINAL, Inputs, input_frames
from weightgeom.interfaces import Setting
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.probes.rsf import RSF
from weightgeom.table import tabulate
from weightgeom.text.tokens import packed

D, K, TOKENS = 32, 4, 512
PROBE = RSF(k=K, tokens=TOKENS, resamples=0, prompts=0)


def final_inputs(model: LanguageModel, examples) -> torch.Tensor:
    """The inputs of a network's unembedding on the held-out text, by a plain hook; fp64."""
    seen = []
    for batch in packed(examples.heldout, model.tokenizer, 96, TOKENS):
        keep = batch.attention_mask.bool()
        unembedding = model.network.get_submodule("lm_head")
        hook = unembedding.register_forward_pre_hook(
            lambda module, given, keep=keep: seen.append(given[0][keep].double())
        )
        model.network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hook.remove()
    return torch.cat(seen)


def axes_of(x: torch.Tensor) -> torch.Tensor:
    """Its right singular vectors in columns, strongest first."""
    return torch.linalg.svd(x.double(), full_matrices=False).Vh.T


def values(rows, quantity: str, role: str, subspace: str) -> list[float]:
    return [
        row["value"]
        for row in rows
        if (row["quantity"], row.get("role"), row.get("subspace")) == (quantity, role, subspace)
    ]


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_the_final_input_is_what_the_unembedding_is_given(name, tokenizer, examples):
    model, params = networks.language_model(name, tokenizer)
    setting = Setting(model, params, params, False, examples, 0)
    *others, frame = input_frames(setting, params, K, Inputs(tokens=TOKENS, final=True))
    assert frame.place == FINAL and len(others) == len(model.architecture.sites)
    axes = axes_of(final_inputs(model, examples))[:, :K]
    assert_close(frame.space.basis @ frame.space.basis.T, axes @ axes.T, rtol=1e-4, atol=1e-4)
    *_, split = input_frames(setting, params, K, Inputs(tokens=TOKENS, budget_gb=1e-9, final=True))
    assert_close(split.space.basis, frame.space.basis, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inside", [True, False])
def test_planted_updates_of_embedding_and_unembedding_have_the_ratio_d_over_k_or_none(
    tokenizer, examples, generator, inside
):
    model, params = networks.language_model("llama", tokenizer)
    part = slice(K) if inside else slice(K, None)
    unembedding = params["lm_head.weight"].double() * params["model.norm.weight"].double()
    written = axes_of(unembedding - unembedding.mean(0))[:, part]
    read = axes_of(final_inputs(model, examples))[:, part]
    end = dict(params)
    for embedding, axes in (("model.embed_tokens.weight", written), ("lm_head.weight", read)):
        weights = torch.randn(len(end[embedding]), axes.shape[1], generator=generator, dtype=torch.float64)
        end[embedding] = (end[embedding].double() + 0.1 * weights @ axes.T).float()
    rows = PROBE.measurement(Setting(model, params, end, False, examples, 0))(end)
    expected = D / K if inside else 0.0
    assert values(rows, "embedding_ratio", "write", "prediction") == pytest.approx([expected], abs=1e-3)
    assert values(rows, "embedding_ratio", "read", "final_input") == pytest.approx([expected], abs=1e-3)
    assert len(values(rows, "embedding_ratio", "write", "attention_input")) == 1
    for role, subspace in (("write", "prediction"), ("read", "final_input")):
        shares = values(rows, "token_fraction", role, subspace)
        assert shares == pytest.approx([expected * K / D] * 10, abs=1e-3)
        (p,) = values(rows, "embedding_p_value", role, subspace)
        assert p == (0.001 if inside else 1.0)
    assert not [row for row in rows if row["quantity"] == "ratio"]  # no matrix moved


def test_ratios_are_those_of_the_dense_update_and_near_one_for_a_random_one(tokenizer, examples, generator):
    model, params = networks.language_model("llama", tokenizer)
    name = "model.embed_tokens.weight"
    delta = 0.1 * torch.randn(params[name].shape, generator=generator)
    end = {**params, name: params[name] + delta}
    rows = PROBE.measurement(Setting(model, params, end, False, examples, 0))(end)
    unembedding = params["lm_head.weight"].double() * params["model.norm.weight"].double()
    axes = axes_of(unembedding - unembedding.mean(0))[:, :K]
    delta = (end[name] - params[name]).double()
    expected = float((delta @ axes).square().sum() / delta.square().sum()) * D / K
    (ratio,) = values(rows, "embedding_ratio", "write", "prediction")
    (sd,) = values(rows, "embedding_null_ratio_sd", "write", "prediction")
    assert ratio == pytest.approx(expected, rel=1e-5) and abs(ratio - 1) < 5 * sd
    assert not values(rows, "embedding_ratio", "read", "final_input")  # the unembedding stays


def test_a_tied_embedding_has_one_size_and_both_sides(tokenizer, examples, generator):
    model, params = networks.language_model("llama_tied", tokenizer)
    name = "model.embed_tokens.weight"
    end = {**params, name: params[name] + 0.1 * torch.randn(params[name].shape, generator=generator)}
    rows = PROBE.measurement(Setting(model, params, end, False, examples, 0))(end)
    assert not [row for row in rows if row["matrix"] == "unembed"]
    mine = [row for row in rows if row["matrix"] == "embed"]
    assert len([row for row in mine if row["quantity"] == "delta_norm"]) == 1
    sides = {(row["role"], row["subspace"]) for row in mine if row["quantity"] == "embedding_ratio"}
    assert sides == {("write", "prediction"), ("write", "attention_input"), ("read", "final_input")}
    # As a state dict has it, by both names.
    start, end = ({**weights, "lm_head.weight": weights[name]} for weights in (params, end))
    assert PROBE.measurement(Setting(model, start, end, False, examples, 0))(end) == rows


def test_the_most_moved_tokens_are_named_with_their_shares(tokenizer, examples, generator):
    model, params = networks.language_model("llama", tokenizer)
    name = "model.embed_tokens.weight"
    order = torch.randperm(len(tokenizer), generator=generator)
    end = {**params, name: params[name].clone()}
    for place, number in enumerate(order[:12].tolist()):
        end[name][number] += (12 - place) * torch.randn(D, generator=generator) / D**0.5 / 4
    end[name][order[0]] = params[name][order[0]] + 9  # the largest by far
    rows = PROBE.measurement(Setting(model, params, end, False, examples, 0))(end)
    norms = {row["token"]: row["value"] for row in rows if row["quantity"] == "token_norm"}
    deltas = (end[name] - params[name]).norm(dim=1)
    most = deltas.topk(10)
    tokens = [tokenizer.convert_ids_to_tokens(number) for number in most.indices.tolist()]
    assert list(norms) == tokens and tokens[0] == tokenizer.convert_ids_to_tokens(int(order[0]))
    assert list(norms.values()) == pytest.approx(most.values.tolist(), rel=1e-6)
    table = tabulate({"step": 1, **row} for row in rows)
    shares = table[table["quantity"] == "token_fraction"]
    assert set(shares["token"]) == set(tokens) and set(shares["n"]) == {D}
    assert np.all((shares["value"] >= 0) & (shares["value"] <= 1))


def test_a_row_behind_the_tokenizers_last_token_is_named_by_its_number(tokenizer, examples):
    size = len(tokenizer) + 3
    config = networks.CONFIGS["llama"](size, 128)
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = LanguageModel(network, tokenizer, architecture_of(config))
    params = {key: weight.clone() for key, weight in network.named_parameters()}
    end = {**params, "model.embed_tokens.weight": params["model.embed_tokens.weight"].clone()}
    end["model.embed_tokens.weight"][-1] += 1
    rows = PROBE.measurement(Setting(model, params, end, False, examples, 0))(end)
    assert {row["token"] for row in rows if "token" in row} == {f"#{size - 1}"}
