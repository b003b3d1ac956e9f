from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.spectrum import Spectrum, gaussian_null, marchenko_pastur_median, spikes
from weightgeom.table import own, tabulate
from weightgeom.training.config import Training

D = 32  # d_model
RANKS = ("participation_ratio", "effective_rank", "stable_rank")
FIT = ("hill_exponent", "hill_distance", "hill_p_value")
KINDS = (*RANKS, *FIT, "top_share", "spikes", "eigenvalue")
TRAINING = Training(max_length=48)


def built(network_class, config, tokenizer, generator):
    """A random model of another architecture; its norms have gains."""
    network = network_class(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4 + ("norm" in name))
    return LanguageModel(network, tokenizer, architecture_of(config))


@pytest.fixture
def sizes(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


@pytest.fixture
def grouped(tokenizer, sizes, generator):
    """A Llama whose four query heads share one key and one value head, of 8 rows each."""
    config = LlamaConfig(**sizes, num_key_value_heads=1)
    return built(LlamaForCausalLM, config, tokenizer, generator)


@pytest.fixture
def olmo(tokenizer, sizes, generator):
    return built(Olmo2ForCausalLM, Olmo2Config(**sizes), tokenizer, generator)


def weights(model):
    return {name: parameter.clone() for name, parameter in model.network.named_parameters()}


def matrix_of(model, name):
    return next(matrix for matrix in model.architecture.matrices if matrix.name == name)


def moved(model, params, name, delta):
    matrix = matrix_of(model, name)
    return matrix.replaced(params, matrix.of(params) + delta.float())


def values(rows, name, quantity):
    """The values of one quantity of one matrix, by their column k."""
    return {
        row["k"]: row["value"]
        for row in rows
        if f"L{row['layer']}.{row['matrix']}" == name and row["quantity"] == quantity
    }


def value(rows, name, quantity):
    (number,) = values(rows, name, quantity).values()
    return number


def with_spectrum(d_out, d_in, singular, generator):
    """A matrix with these singular values, its singular vectors random."""
    left, right = (
        torch.linalg.qr(torch.randn(d, len(singular), generator=generator, dtype=torch.float64)).Q
        for d in (d_out, d_in)
    )
    return left @ torch.tensor(singular, dtype=torch.float64).diag() @ right.T


@pytest.mark.parametrize("name", ["L0.q", "L1.up", "L0.o", "L1.down"])
def test_a_delta_of_r_equal_directions_has_r_for_participation_ratio_rank_and_spikes(
    model, params, at, generator, name
):
    d_out, d_in = matrix_of(model, name).of(params).shape
    delta = with_spectrum(d_out, d_in, [0.7] * 5, generator)
    rows = Spectrum(of=["delta"]).measurement(at(params))(moved(model, params, name, delta))
    # The delta is a difference of fp32 weights, whose rounding is 1e-7 of it; its spectrum moves by as much.
    for quantity in ("participation_ratio", "effective_rank", "spikes"):
        assert_close(value(rows, name, f"delta_{quantity}"), 5.0, rtol=1e-5, atol=0)
    assert_close(value(rows, name, "delta_top_share"), 0.2, rtol=1e-5, atol=0)
    shares = values(rows, name, "delta_eigenvalue")
    assert list(shares) == [*range(1, 17)]
    assert_close(list(shares.values()), [0.2] * 5 + [0.0] * 11, rtol=1e-5, atol=0)


def test_unequal_shares_have_the_closed_form(model, params, at, generator):
    # λ = σ² = 2, 1, 1, so p = 1/2, 1/4, 1/4: 1 / Σp² = 1 / (1/4 + 1/16 + 1/16) = 8/3, and the entropy is
    # 1/2 ln 2 + 2 · 1/4 ln 4 = 3/2 ln 2, so that the effective rank is 2^(3/2).
    delta = with_spectrum(D, D, [sqrt(2), 1, 1], generator)
    rows = Spectrum(of=["delta"]).measurement(at(params))(moved(model, params, "L1.k", delta))
    assert_close(value(rows, "L1.k", "delta_participation_ratio"), 8 / 3, rtol=1e-5, atol=0)
    assert_close(value(rows, "L1.k", "delta_effective_rank"), 2**1.5, rtol=1e-5, atol=0)
    assert_close(value(rows, "L1.k", "delta_top_share"), 0.5, rtol=1e-5, atol=0)


def test_the_median_of_the_marchenko_pastur_law_is_that_of_gavish_and_donoho():
    for ratio in (0.05, 0.1, 0.3, 0.5, 0.8, 1.0):
        # Their threshold for unknown noise, ω = λ*/√μ, and their cubic for it, good to 0.02.
        threshold = sqrt(2 * (ratio + 1) + 8 * ratio / (ratio + 1 + sqrt(ratio**2 + 14 * ratio + 1)))
        cubic = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
        assert abs(threshold / sqrt(marchenko_pastur_median(ratio)) - cubic) < 0.02
    assert_close(4 / sqrt(3) / sqrt(marchenko_pastur_median(1.0)), 2.858, rtol=0, atol=5e-4)


def test_the_median_is_that_of_the_singular_values_of_noise(generator):
    squares = torch.linalg.svdvals(torch.randn(300, 900, generator=generator)) ** 2
    # The eigenvalues of a random matrix are rigid: its median fluctuates by some 1/300 of the law's width.
    assert_close(squares.median().item() / 900, marchenko_pastur_median(1 / 3), rtol=0.02, atol=0)


def squared(x):
    return torch.linalg.svdvals(x.double()) ** 2


def test_noise_alone_seldom_has_a_spike_and_planted_ones_are_all_counted(generator):
    shape = (48, 96)
    noise = [torch.randn(*shape, generator=generator) for _ in range(200)]
    rate = sum(spikes(squared(draw), shape) > 0 for draw in noise) / 200
    # 0.17 in the limit; binomial sd √(0.17 · 0.83 / 200) = 0.027, five of those, and as much for the size.
    assert 0 < rate < 0.17 + 0.27
    for count in (1, 3):
        # Three times the edge: above it whatever the noise does.
        planted = with_spectrum(*shape, [3 * (sqrt(48) + sqrt(96))] * count, generator)
        counts = [spikes(squared(draw + planted), shape) for draw in noise[:50]]
        assert min(counts) == count
        # Three of 48 directions raise the median, and with it the edge, by some 3 of 48 ranks: noise then
        # has a spike at most as often as alone.
        assert sum(counts) / 50 < count + 0.44


def test_the_count_of_spikes_does_not_depend_on_the_scale_of_the_noise(generator):
    x = torch.randn(40, 60, generator=generator) + with_spectrum(40, 60, [60.0, 50.0], generator)
    assert spikes(squared(x), (40, 60)) == spikes(squared(1e-4 * x), (60, 40)) >= 2


def test_weights_of_noise_have_the_spike_that_was_planted(model, params, at, generator):
    name = "L0.down"
    matrix = matrix_of(model, name)
    noise = torch.randn(D, 48, generator=generator)
    spiked = noise + with_spectrum(D, 48, [40.0], generator)  # the edge is √32 + √48 = 12.6
    counts = [
        value(
            Spectrum(of=["weight"]).measurement(at(params))(matrix.replaced(params, weight.float())),
            name,
            "weight_spikes",
        )
        for weight in (noise, spiked)
    ]
    assert counts == [0, 1]


def test_heavy_tailed_entries_exceed_the_edge_by_themselves_and_gaussian_ones_do_not(
    model, params, at, generator
):
    matrix = matrix_of(model, "L0.down")
    gaussian = torch.randn(D, 48, generator=generator)
    # Student's t with 2 degrees of freedom: its entries have no fourth moment, and not even a variance.
    heavy = gaussian / torch.rand(D, 48, generator=generator).log().neg().sqrt()
    rows_by_entries = {
        name: Spectrum(of=["weight"]).measurement(at(params))(matrix.replaced(params, weight))
        for name, weight in (("gaussian", gaussian), ("heavy", heavy))
    }
    informative = {
        name: value(rows, "L0.down", "weight_edge_informative") for name, rows in rows_by_entries.items()
    }
    assert informative == {"gaussian": 1, "heavy": 0}
    spiked = value(rows_by_entries["heavy"], "L0.down", "weight_spikes")
    assert abs(spiked - value(rows_by_entries["heavy"], "L0.down", "null_weight_spikes_mean")) <= 3
    # A strong direction stands out from Gaussian entries, and its own entries in random places do not.
    planted = Spectrum(of=["weight"]).measurement(at(params))(
        matrix.replaced(params, gaussian + with_spectrum(D, 48, [40.0], generator).float())
    )
    assert value(planted, "L0.down", "weight_spikes") == 1
    assert value(planted, "L0.down", "weight_edge_informative") == 1
    none = Spectrum(of=["weight"], shuffles=0).measurement(at(params))(params)
    assert not any("edge" in row["quantity"] or "null_weight_spikes" in row["quantity"] for row in none)


@pytest.mark.slow
def test_heavy_tailed_iid_entries_are_draws_from_their_null(generator):
    def heavy():
        return torch.randn(24, 36, generator=generator) / torch.rand(24, 36, generator=generator).sqrt()

    differences = []
    for _ in range(500):
        x = heavy()
        shuffled = x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x)
        counts = [spikes(squared(y), (24, 36)) for y in (x, shuffled)]
        differences.append(counts[0] - counts[1])
    # Exchangeable, so that their difference has mean 0.
    excess = torch.tensor(differences, dtype=torch.float64)
    assert abs(excess.mean()) < 3 * excess.std() / sqrt(500)
    assert excess.std() > 0


def test_ranks_and_exponents_of_noise_are_draws_from_their_null(generator):
    null = gaussian_null(24, 40, 0)
    drawn = [torch.linalg.svdvals(torch.randn(24, 40, generator=generator).double()) ** 2 for _ in range(500)]
    stable = torch.tensor([float(values.sum() / values[0]) for values in drawn])
    pooled = sqrt(float(null["stable_rank"].var()) * (1 / 19 + 1 / 500))
    assert abs(float(stable.mean() - null["stable_rank"].mean())) < 4 * pooled
    # ‖W‖²_F / ‖W‖²_2 → m n / (√m + √n)²; the largest value of finite matrices is below the edge.
    assert 24 * 40 / (sqrt(24) + sqrt(40)) ** 2 < stable.mean() < 1.3 * 24 * 40 / (sqrt(24) + sqrt(40)) ** 2


def stream(network, tokenizer, texts, module, length=96):
    """Inputs of a module on the packed text, by plain hooks, as fp64 numpy (token, d)."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    seen = []
    hook = network.get_submodule(module).register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0][0].double().numpy())
    )
    for start in range(0, len(ids), length):
        if len(part := ids[start : start + length]) > 1:
            network(input_ids=torch.tensor([part]))
    hook.remove()
    return np.concatenate(seen)


def agree(rows, name, thing, singular, entries):
    """All quantities of a thing are those of the singular values of the matrix behind its moment."""
    shares = singular**2 / (singular**2).sum()
    shares = shares[shares > 1e-12]
    expected = {
        "participation_ratio": 1 / (shares**2).sum(),
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "stable_rank": singular[0] ** -2 * (singular**2).sum(),
        "top_share": shares[0],
    }
    for quantity, number in expected.items():
        assert_close(value(rows, name, f"{thing}_{quantity}"), float(number), rtol=1e-3, atol=0)
    eigenvalues = values(rows, name, f"{thing}_eigenvalue")
    # fp32 sums: 1e-7 of the largest eigenvalue, many times over.
    assert_close(list(eigenvalues.values()), shares[:16].tolist(), rtol=1e-3, atol=2e-6)
    about = [row for row in rows if row["quantity"].startswith(thing)]
    fitted = ("hill", "edge")
    assert {row["n"] for row in about if not any(part in row["quantity"] for part in fitted)} == {entries}


def test_activations_have_the_spectrum_of_what_the_hooks_see(model, examples, params, at):
    rows = Spectrum(of=["activation"]).measurement(at(params))(params)
    for name, module in (
        ("L0.q", "layers.0.attention.query_key_value"),
        ("L1.up", "layers.1.mlp.dense_h_to_4h"),
    ):
        a = stream(model.network, model.tokenizer, examples.heldout, f"gpt_neox.{module}")
        singular = np.linalg.svd(a, compute_uv=False)
        agree(rows, name, "activation", singular, len(a))
        counted = spikes(torch.from_numpy(singular**2), a.shape)
        assert value(rows, name, "activation_spikes") == counted
    assert {row["matrix"] for row in rows} == {"q", "up"}


def test_a_moment_of_few_tokens_has_no_more_directions_than_tokens(params, at):
    rows = Spectrum(of=["activation"], tokens=6, length=6).measurement(at(params))(params)
    assert {row["n"] for row in rows if not row["quantity"].startswith("null")} == {6}
    assert [*values(rows, "L0.q", "activation_eigenvalue")] == [1, 2, 3, 4, 5, 6]


def test_gradients_have_the_spectrum_of_their_moments(model, examples, params, at):
    probe = Spectrum(of=["upstream", "gradient"], prompts=6)
    rows = probe.measurement(at(params, objective=DPO()))(params)
    gathering = Gathering(prompts=6, inputs=False)
    (gathered_pass,) = gradient_moments(model, params, DPO(), TRAINING, examples, gathering, seed=3)
    for name in ("L0.o", "L1.down"):
        upstream = gathered_pass.upstream[name]
        squares = torch.linalg.eigvalsh(upstream.value.double()).flip(0).clamp(min=0)
        agree(rows, name, "upstream", squares.sqrt().numpy(), upstream.samples)
    for name in ("L1.k", "L0.up", "L0.down"):
        matrix = matrix_of(model, name)
        gradient = matrix.of({matrix.parameter: gathered_pass.gradients[matrix.parameter].value})
        agree(rows, name, "gradient", np.linalg.svd(gradient.double().numpy(), compute_uv=False), 6)
    assert {row["matrix"] for row in rows if row["quantity"].startswith("upstream")} == {"o", "down"}


def test_every_quantity_is_there_with_its_place_unit_and_number_of_samples(model, params, at, generator):
    after = {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in params.items()
    }
    things = {
        False: {"activation", "delta", "weight"},
        True: {"activation", "upstream", "gradient", "delta", "weight"},
    }
    for known, of in things.items():
        setting = at(params, objective=DPO() if known else None)
        rows = Spectrum(prompts=4, tokens=300).measurement(setting)(after)
        table = tabulate([row | {"step": 1} for row in rows])
        quantities = {f"{thing}_{kind}" for thing in of for kind in KINDS}
        for end in ("mean", "sd"):
            quantities |= {f"null_{thing}_{kind}_{end}" for thing in of for kind in (*RANKS, "hill_exponent")}
            quantities |= {f"null_{thing}_spikes_{end}" for thing in of - {"activation", "upstream"}}
        quantities |= {f"{thing}_edge_informative" for thing in of - {"activation", "upstream"}}
        assert set(table["quantity"]) == quantities
        assert set(table["unit"]) == {"1"} and min(table["n"]) > 0 and min(table["k"]) == 1
        assert set(table["subspace"]) == {"residual", "attention_input", "mlp_input"}
        inputs = table[table["quantity"] == "activation_spikes"]
        assert [*zip(inputs["layer"], inputs["matrix"], inputs["subspace"], strict=True)] == [
            (layer, kind, site)
            for layer in (0, 1)
            for kind, site in (("q", "attention_input"), ("up", "mlp_input"))
        ]
        # A run logs one headline for each matrix and layer.
        headline = own(table, Spectrum().declaration.headline)
        assert sorted(zip(headline["layer"], headline["matrix"], strict=True)) == sorted(
            (matrix.layer, matrix.kind) for matrix in model.architecture.matrices
        )


def test_keys_of_one_shared_head_have_no_more_directions_than_rows(grouped, at):
    params = weights(grouped)
    rows = Spectrum(of=["weight", "delta"]).measurement(at(params, of=grouped))(
        {name: 1.5 * weight for name, weight in params.items()}
    )
    assert [*values(rows, "L0.k", "weight_eigenvalue")] == [*range(1, 9)]
    assert [*values(rows, "L0.q", "weight_eigenvalue")] == [*range(1, 17)]
    singular = np.linalg.svd(matrix_of(grouped, "L1.v").of(params).double().numpy(), compute_uv=False)
    shares = singular**2 / (singular**2).sum()
    for thing in ("weight", "delta"):  # the delta is half the weight
        assert_close(
            list(values(rows, "L1.v", f"{thing}_eigenvalue").values()), shares.tolist(), rtol=1e-4, atol=1e-6
        )
    table = tabulate([row | {"step": 1} for row in rows])
    assert set(own(table, Spectrum().declaration.headline)["matrix"]) == {
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    }


def test_what_a_post_norm_scales_counts_as_it_reaches_the_stream(olmo, at):
    params = weights(olmo)
    rows = Spectrum(of=["weight"]).measurement(at(params, of=olmo))(params)
    gain = params["model.layers.1.post_attention_layernorm.weight"].double()
    written = gain[:, None] * matrix_of(olmo, "L1.o").of(params).double()
    singular = np.linalg.svd(written.numpy(), compute_uv=False)
    shares = singular**2 / (singular**2).sum()
    eigenvalues = list(values(rows, "L1.o", "weight_eigenvalue").values())
    assert_close(eigenvalues, shares[:16].tolist(), rtol=1e-4, atol=1e-6)


def test_without_an_update_only_the_update_is_missing(params, at):
    rows = Spectrum(tokens=300).measurement(at(params))(params)
    things = {row["quantity"].removeprefix("null_").partition("_")[0] for row in rows}
    assert things == {"activation", "weight"}


def test_the_update_is_that_since_the_start_and_activations_are_those_of_the_checkpoint(
    params, at, generator
):
    def other():
        return {
            name: weight + 0.3 * torch.randn(weight.shape, generator=generator)
            for name, weight in params.items()
        }

    after, end = other(), other()
    probe = Spectrum(of=["activation", "delta"], tokens=300)
    rows = probe.measurement(at(params, end))(after)
    assert rows == probe.measurement(at(params, params))(after)
    elsewhere = probe.measurement(at(end, params))(after)
    for quantity, of_the_checkpoint in (("activation_top_share", True), ("delta_top_share", False)):
        same = values(rows, "L1.q", quantity) == values(elsewhere, "L1.q", quantity)
        assert same == of_the_checkpoint
    assert values(rows, "L1.q", "activation_top_share") != values(
        probe.measurement(at(params))(end), "L1.q", "activation_top_share"
    )


def test_top_says_how_many_eigenvalues_have_rows(params, at):
    for top, expected in ((3, 3), (99, D)):
        rows = Spectrum(of=["weight"], top=top).measurement(at(params))(params)
        assert len(values(rows, "L0.q", "weight_eigenvalue")) == expected


def test_gradients_are_those_of_the_checkpoint(params, at, generator):
    setting = at(params, objective=DPO())
    measure = Spectrum(of=["gradient"], prompts=4).measurement(setting)
    after = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in params.items()
    }
    there = measure(after)
    same = Spectrum(of=["gradient"], prompts=4).measurement(replace(setting, start=after))(after)
    assert there == same != measure(params)


@pytest.mark.parametrize("wrong", [{"of": []}, {"of": ["bias"]}, {"top": 0}, {"budget_gb": 0}])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Spectrum(**wrong)


def test_every_architecture_will_do(model):
    Spectrum().check(model.architecture)
