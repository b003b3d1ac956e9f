from dataclasses import replace

import networks
import pytest
import torch
from torch.testing import assert_close

from weightgeom.estimators.products import check_products, head_products
from weightgeom.estimators.reference_subspaces import Inputs, input_frames, prediction_frame
from weightgeom.geometry.nulls import rotation_null, spectrum_shares
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import Adapted, LowRank
from weightgeom.models.residual import architecture_of
from weightgeom.probes.rsf import RSF
from weightgeom.table import tabulate

D, K, TOKENS = 32, 4, 512
PROBE = RSF(k=K, tokens=TOKENS, resamples=0, prompts=0, products=True)


def moved(params, generator, names, scale=0.05):
    return {
        key: weight + scale * torch.randn(weight.shape, generator=generator)
        if any(n in key for n in names)
        else weight
        for key, weight in params.items()
    }


def dense(model, params, layer):
    """The products of every head, multiplied out: W_Qᵀ W_K and what v writes through o."""
    of = {matrix.kind: matrix for matrix in model.architecture.matrices if matrix.layer == layer}
    q, k, v = (of[kind].of(params).double() for kind in "qkv")
    o = of["o"].written(params).double()
    heads, groups = of["q"].heads, of["k"].heads
    width, wide = len(q) // heads, o.shape[1] // heads
    qk, ov = [], []
    for head in range(heads):
        group = head // (heads // groups)
        mine = slice(head * width, (head + 1) * width)
        qk.append(q[mine].T @ k[group * width : (group + 1) * width])
        ov.append(o[:, head * wide : (head + 1) * wide] @ v[group * wide : (group + 1) * wide])
    return {"qk": qk, "ov": ov}


def values(rows, quantity):
    return {
        (row["layer"], row["matrix"], row["head"]): row["value"]
        for row in rows
        if row["quantity"] == quantity and row["matrix"] in ("qk", "ov")
    }


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "falcon_new", "gpt2", "olmo2", "granite"])
def test_products_are_those_of_dense_matrices_head_by_head(name, tokenizer, examples, generator):
    model, params = networks.language_model(name, tokenizer)
    end = moved(params, generator, ("weight",))
    setting = Setting(model, params, end, False, examples, 0)
    rows = PROBE.measurement(setting)(end)
    frames = {frame.place: frame.space for frame in input_frames(setting, params, K, Inputs(tokens=TOKENS))}
    written = prediction_frame(setting, params, K).space.basis
    for layer in range(2):
        read = frames["attention_input", layer].basis
        before, after = dense(model, params, layer), dense(model, end, layer)
        for product, sides in (("qk", ("query", "key")), ("ov", ("write", "read"))):
            for head, (old, new) in enumerate(zip(before[product], after[product], strict=True)):
                delta, at = new - old, (layer, product, head)
                energy = delta.square().sum()
                left = read if product == "qk" else written
                fractions = [
                    float((left.T @ delta).square().sum() / energy),
                    float((delta @ read).square().sum() / energy),
                ]
                assert values(rows, "product_norm")[at] == pytest.approx(float(delta.norm()), rel=1e-5)
                null = rotation_null(spectrum_shares(delta.T @ delta), K, 0)
                for side, fraction in zip(sides, fractions, strict=True):
                    assert values(rows, f"{side}_fraction")[at] == pytest.approx(fraction, rel=1e-4)
                    assert values(rows, f"{side}_ratio")[at] == pytest.approx(fraction * D / K, rel=1e-4)
                    assert values(rows, f"{side}_null_ratio_sd")[at] == pytest.approx(
                        null.sd * D / K, rel=1e-4
                    )
                    assert values(rows, f"{side}_z")[at] == pytest.approx(
                        null.z(fraction), rel=1e-3, abs=1e-3
                    )
                # [tr(dMᵀ P_L dM) + tr(dM P_R dMᵀ)] / ‖dM‖², over its isotropic level 2 k/d
                both = torch.trace(delta.T @ left @ left.T @ delta) + torch.trace(
                    delta @ read @ read.T @ delta.T
                )
                expected = float(both / energy) / (2 * K / D)
                assert values(rows, "sum_ratio")[at] == pytest.approx(expected, rel=1e-4)
                sd = 2**0.5 * null.sd / (2 * K / D)
                assert values(rows, "sum_null_ratio_sd")[at] == pytest.approx(sd, rel=1e-4)
    assert len(values(rows, "sum_ratio")) == 2 * 2 * model.architecture.n_heads
    tabulate({"step": 1, **row} for row in rows)


@pytest.mark.parametrize("inside", [True, False])
def test_an_update_of_queries_alone_in_the_input_subspace_has_the_query_ratio_d_over_k(
    tokenizer, examples, generator, inside
):
    model, params = networks.language_model("llama", tokenizer)
    setting = Setting(model, params, params, False, examples, 0)
    frames = {frame.place: frame.space for frame in input_frames(setting, params, D, Inputs(tokens=TOKENS))}
    axes = frames["attention_input", 1].basis
    axes = axes[:, :K] if inside else axes[:, K:]
    name = "model.layers.1.self_attn.q_proj.weight"
    weights = torch.randn(len(params[name]), axes.shape[1], generator=generator, dtype=torch.float64)
    end = {**params, name: (params[name].double() + 0.1 * weights @ axes.T).float()}
    rows = PROBE.measurement(replace(setting, end=end))(end)
    ratios = {at: value for at, value in values(rows, "query_ratio").items() if at[0] == 1}
    assert ratios == pytest.approx({(1, "qk", head): D / K if inside else 0.0 for head in range(4)}, abs=1e-3)
    # The other side is that of the unmoved keys, which two query heads share.
    key = params["model.layers.1.self_attn.k_proj.weight"].double()
    keys = values(rows, "key_ratio")
    for head in range(4):
        delta = (end[name] - params[name]).double().unflatten(0, (4, -1))[head].T
        product = delta @ key.unflatten(0, (2, -1))[head // 2]
        read = frames["attention_input", 1].first(K).basis
        expected = float((product @ read).square().sum() / product.square().sum()) * D / K
        assert keys[1, "qk", head] == pytest.approx(expected, rel=1e-4)
    assert {value for at, value in values(rows, "product_norm").items() if at[:2] != (1, "qk")} == {0.0}


def test_a_small_update_is_not_lost_in_the_difference_of_two_products(tokenizer, generator):
    model, params = networks.language_model("llama", tokenizer)
    params = {name: weight.double() for name, weight in params.items()}
    end = {
        name: weight + 1e-9 * torch.randn(weight.shape, generator=generator).double()
        for name, weight in params.items()
    }
    of = {matrix.kind: matrix for matrix in model.architecture.matrices if matrix.layer == 0}
    q, k = of["q"], of["k"]
    d_q, d_k = (matrix.of(end) - matrix.of(params) for matrix in (q, k))
    for head, update in enumerate(head_products(q, k, end, params)):
        mine, group = slice(head * 6, (head + 1) * 6), slice(head // 2 * 6, (head // 2 + 1) * 6)
        # First order in the update; the second order is 1e-9 of it.
        expected = d_q[mine].T @ k.of(params)[group] + q.of(params)[mine].T @ d_k[group]
        assert_close(update.left @ update.core @ update.right.T, expected, rtol=1e-5, atol=1e-14)
        assert update.core.shape == (12, 12)  # 2 d_head, not d


def test_products_of_an_adapter_come_from_its_factors(tokenizer, generator):
    model, params = networks.language_model("llama", tokenizer)
    of = {matrix.kind: matrix for matrix in model.architecture.matrices if matrix.layer == 0}
    b, a = torch.randn(24, 2, generator=generator) * 1e-8, torch.randn(2, D, generator=generator)
    after = Adapted(params, {of["q"].parameter: LowRank(b, a)}, {}, frozenset())
    (update, *_) = head_products(of["q"], of["k"], after, params)
    expected = (b.double() @ a.double())[:6].T @ of["k"].of(params)[:6].double()
    assert_close(update.left @ update.core @ update.right.T, expected, rtol=1e-6, atol=1e-14)


def test_models_without_such_heads_are_refused_and_layers_without_are_logged(caplog):
    latent, hybrid = (
        architecture_of(networks.MIXTURES[name](100, 64)) for name in ("deepseek_v3", "qwen3_next")
    )
    with pytest.raises(ValueError, match=r"heads of q, k, v and o, and this model has none.*products=false"):
        PROBE.check(latent)
    PROBE.check(architecture_of(networks.CONFIGS["llama"](100, 64)))
    assert not caplog.text
    with caplog.at_level("INFO"):
        check_products(hybrid)
    assert "in layers 0, 1, which have no such heads" in caplog.text


def test_a_hybrid_has_products_in_its_layers_of_softmax_attention(tokenizer, examples, generator):
    model, params = networks.language_model("qwen3_5_text", tokenizer)
    end = moved(params, generator, ("proj.weight",))
    rows = PROBE.measurement(Setting(model, params, end, False, examples, 0))(end)
    assert {at[0] for at in values(rows, "sum_ratio")} == {1}


def test_without_the_option_there_are_none_and_with_it_no_other_number_changes(
    tokenizer, examples, generator
):
    model, params = networks.language_model("gpt_neox", tokenizer)
    end = moved(params, generator, ("weight",))
    setting = Setting(model, params, end, False, examples, 0)
    plain, more = (replace(PROBE, products=on).measurement(setting)(end) for on in (False, True))
    assert [row for row in more if row["matrix"] not in ("qk", "ov")] == plain
