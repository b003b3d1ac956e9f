from dataclasses import replace

import numpy as np
import pytest
import torch
from moving import matrix_of, moved
from torch.testing import assert_close
from transformers import Olmo2Config, Olmo2ForCausalLM

from weightgeom.geometry.nulls import isotropic_null, rotation_null, spectrum_shares
from weightgeom.interfaces import Setting
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.objectives.ce import CE
from weightgeom.probes.rsf import RSF
from weightgeom.table import tabulate
from weightgeom.training.config import Training

D, K = 32, 4  # d_model and the default k, d/8
COMPARED = {"fraction", "ratio", "null_ratio_mean", "null_ratio_sd", "z", "p_value", "q_value"}
INTERVAL = {"ratio_low", "ratio_high"}  # where the subspace is estimated from text
MATCHED = {f"matched_{what}" for what in ("ratio", "ratio_low", "ratio_high", "z", "p_value", "q_value")}


@pytest.fixture
def at(model, examples):
    """A setting between two models, with a seed of its own."""

    def setting(start, end=None, from_random=False, of=model):
        return Setting(of, start, end or start, from_random, examples, seed=3)

    return setting


def noise(model, params, generator, scale=0.1):
    """A Gaussian delta for every matrix."""
    return {
        matrix.name: scale * torch.randn(matrix.of(params).shape, generator=generator)
        for matrix in model.architecture.matrices
    }


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


def input_axes(model, examples, name, centre=False):
    """Principal directions of the input of one matrix, strongest first, in columns."""
    layer = f"gpt_neox.layers.{name[1]}"
    module = f"{layer}.mlp.dense_h_to_4h" if name[3:] == "up" else f"{layer}.attention.query_key_value"
    a = stream(model.network, model.tokenizer, examples.heldout, module)
    return np.linalg.svd(a - a.mean(0) if centre else a, full_matrices=False)[2].T, a


def output_axes(params, centre=True, fold=True):
    """Right singular vectors of the unembedding, strongest first, in columns."""
    unembedding = params["lm_head.weight"].double().numpy()
    if fold:
        unembedding = unembedding * params["gpt_neox.final_layer_norm.weight"].double().numpy()
    unembedding = unembedding - unembedding.mean(0) if centre else unembedding
    return np.linalg.svd(unembedding, full_matrices=False)[2].T


def planted(basis, other, generator, role):
    """A random delta whose input (read) or output (write) side lies in the span of the basis."""
    basis = torch.from_numpy(basis.copy())
    inside = basis @ torch.randn(basis.shape[1], other, generator=generator, dtype=torch.float64)
    return inside.T if role == "read" else inside


def value(rows, name, quantity, subspace="", k=None):
    (number,) = [
        row["value"]
        for row in rows
        if f"L{row['layer']}.{row['matrix']}" == name
        and row["quantity"] == quantity
        and (not subspace or row["subspace"] == subspace)
        and (k is None or row["k"] == k)
    ]
    return number


def own(name):
    return {"o": "prediction", "down": "prediction", "up": "mlp_input"}.get(name[3:], "attention_input")


def ratio(rows, name, k=None):
    return value(rows, name, "ratio", own(name), k)


def close(actual, expected):
    # Inputs and weights are fp32, and the delta is a difference of fp32 weights: 1e-6 of it, squared,
    # plus the turn of the subspace by 1e-6 over the gap of its spectrum, squared.
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_deltas_planted_in_what_the_model_reads_or_predicts_have_the_ratio_d_over_k(
    model, examples, params, at, generator, inside
):
    deltas, predicted = {}, output_axes(params)
    part = slice(K) if inside else slice(K, None)
    for matrix in model.architecture.matrices:
        axes = input_axes(model, examples, matrix.name)[0] if matrix.role == "read" else predicted
        other = matrix.of(params).shape[0 if matrix.role == "read" else 1]
        deltas[matrix.name] = planted(axes[:, part], other, generator, matrix.role)
    rows = RSF().measurement(at(params))(moved(model, params, deltas))
    for name in deltas:
        close(ratio(rows, name), D / K if inside else 0.0)
        close(value(rows, name, "fraction", own(name)), 1.0 if inside else 0.0)


def test_a_delta_of_one_matrix_is_the_delta_of_that_matrix_alone(model, params, at, generator):
    delta = torch.zeros(D, D)
    delta[0, 0] = 0.5
    rows = RSF().measurement(at(params))(moved(model, params, {"L1.k": delta}))
    close(value(rows, "L1.k", "delta_norm"), 0.5)
    assert_close(value(rows, "L1.k", "moved_share"), 1 / D**2)
    assert {row["matrix"] for row in rows if row["quantity"] == "ratio"} == {"k"}


def test_without_an_update_there_are_only_its_norm_and_the_share_that_moved(model, params, at):
    rows = RSF().measurement(at(params))(params)
    assert all(row["value"] == 0 for row in rows)
    matrices = model.architecture.matrices
    expected = [(q, matrix.name) for matrix in matrices for q in ("delta_norm", "moved_share")]
    norms = [row for row in rows if "parameter" not in row]
    assert [(row["quantity"], f"L{row['layer']}.{row['matrix']}") for row in norms] == expected


def test_every_row_has_its_place_its_unit_and_its_number_of_samples(model, examples, params, at, generator):
    rows = RSF().measurement(at(params))(moved(model, params, noise(model, params, generator)))
    tabulate([row | {"step": 1} for row in rows])  # refuses what a table cannot hold
    for matrix in model.architecture.matrices:
        mine = [row for row in rows if f"L{row['layer']}.{row['matrix']}" == matrix.name]
        entries = matrix.of(params).numel()
        assert all(row["role"] == matrix.role and row["unit"] == "1" for row in mine)
        assert {row["subspace"] for row in mine if "subspace" in row} == {own(matrix.name), "random"}
        assert {row["k"] for row in mine if "k" in row} == {K}
        by_subspace = {
            place: {row["quantity"] for row in mine if row.get("subspace") == place}
            for place in (None, own(matrix.name), "random")
        }
        crossfit = {"crossfit_ratio", "crossfit_matched_ratio"}
        counted = {"tokens_per_dimension"} if matrix.role == "read" else set()
        matched = MATCHED | INTERVAL | crossfit if matrix.role == "read" else set()
        assert by_subspace == {
            None: {"delta_norm", "moved_share"} | counted,
            own(matrix.name): COMPARED | matched,
            "random": COMPARED,
        }
        tokens = sum(len(text.split()) + 1 for text in examples.heldout)
        n = {"q_value": 12, "matched_q_value": 8}  # matrices, and those that read
        for row in mine:
            other = tokens if row["quantity"].startswith(("matched", "crossfit", "tokens")) else entries
            assert row["n"] == n.get(row["quantity"], other)


@pytest.mark.parametrize("kind", ["rotation", "isotropic"])
def test_nulls_are_those_of_the_delta_and_its_side(model, params, at, generator, kind):
    deltas = noise(model, params, generator)
    after = moved(model, params, deltas)
    rows = RSF(null_kind=kind).measurement(at(params))(after)
    for matrix in model.architecture.matrices:
        delta = matrix.of(after) - matrix.of(params)
        x = delta if matrix.role == "read" else delta.T
        shares = spectrum_shares(x.double().T @ x.double())
        null = rotation_null(shares, K, seed=3) if kind == "rotation" else isotropic_null(D, K, x.shape[0])
        for subspace in (own(matrix.name), "random"):
            fraction = value(rows, matrix.name, "fraction", subspace)
            expected = {
                "null_ratio_mean": 1.0,
                "null_ratio_sd": null.sd * D / K,
                "z": (fraction - K / D) / null.sd,
                "p_value": null.p_value(fraction)[0],
                "ratio": fraction * D / K,
            }
            actual = {quantity: value(rows, matrix.name, quantity, subspace) for quantity in expected}
            assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # the probe's Gram matrix is fp32


def test_the_matched_ratio_is_the_explained_variance_of_the_input(model, examples, params, at, generator):
    rows = RSF().measurement(at(params))(moved(model, params, noise(model, params, generator)))
    for name in ("L0.q", "L1.v", "L1.up"):
        axes, a = input_axes(model, examples, name)
        explained = np.square(a @ axes[:, :K]).sum() / np.square(a).sum()
        close(value(rows, name, "matched_ratio"), float(explained) * D / K)


def test_what_is_written_independently_of_what_is_read_has_the_matched_ratio(
    model, examples, params, at, generator
):
    _, a = input_axes(model, examples, "L0.q")
    # dW = Σ δ aᵀ with as many orthonormal δ as tokens would have dWᵀ dW = Σ a aᵀ; so has any rotation
    # of a root of E[a aᵀ], up to a factor, and it fits into the matrix.
    root = np.linalg.cholesky(a.T @ a / len(a)).T  # rootᵀ root = E[a aᵀ]
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    delta = turn @ torch.from_numpy(root)
    rows = RSF().measurement(at(params))(moved(model, params, {"L0.q": delta}))
    close(ratio(rows, "L0.q"), value(rows, "L0.q", "matched_ratio"))


def test_a_list_of_k_gives_a_curve_whose_points_are_those_of_each_k(model, params, at, generator):
    after = moved(model, params, noise(model, params, generator))
    curve = RSF(k=[8, 2, 32, 8]).measurement(at(params))(after)
    assert [row["k"] for row in curve if row["quantity"] == "ratio"][:3] == [2, 8, 32]
    for k in (2, 8):
        single = RSF(k=k).measurement(at(params))(after)
        for name in ("L0.q", "L1.down"):
            assert_close(ratio(curve, name, k), ratio(single, name))
    assert_close(ratio(curve, "L1.o", 32), 1.0)  # k = d holds everything
    assert (
        value(curve, "L1.o", "p_value", "prediction", 32) == 1
        and value(curve, "L1.o", "z", "random", 32) == 0
    )


def test_the_random_subspace_is_that_of_the_seed(model, params, at, generator):
    after = moved(model, params, noise(model, params, generator))
    same, again, other = (
        value(RSF().measurement(replace(at(params), seed=seed))(after), "L0.o", "ratio", "random")
        for seed in (3, 3, 4)
    )
    assert same == again != other


@pytest.fixture
def three(model, params, generator):
    """Weights that differ so much that their subspaces do."""

    def other(scale):
        return {
            name: weight + scale * torch.randn(weight.shape, generator=generator)
            for name, weight in params.items()
        }

    return params, other(0.3), other(0.3)


@pytest.mark.parametrize(
    ("where", "from_random", "whose"),
    [
        ("start", False, "start"),
        ("step", False, "step"),
        ("end", False, "end"),
        ("auto", False, "start"),
        ("auto", True, "step"),
        ("start", True, "start"),
    ],
)
def test_at_says_whose_subspaces_are_taken(model, at, three, where, from_random, whose):
    start, step, end = three
    rows = RSF(at=where).measurement(at(start, end, from_random))(step)
    # The delta is always that since the start; only the subspaces are another model's.
    frame = {"start": start, "step": step, "end": end}[whose]
    for name in ("L0.o", "L1.down"):
        matrix = matrix_of(model, name)
        delta = (matrix.of(step) - matrix.of(start)).double().numpy()
        basis = output_axes(frame)[:, :K]
        expected = np.square(basis.T @ delta).sum() / np.square(delta).sum() * D / K
        close(ratio(rows, name), float(expected))
    for name in ("L0.q", "L1.up"):
        matrix, site = matrix_of(model, name), own(name)
        delta = (matrix.of(step) - matrix.of(start)).double().numpy()
        basis = input_basis(model, frame, at(start).examples, name)
        expected = np.square(delta @ basis).sum() / np.square(delta).sum() * D / K
        close(value(rows, name, "ratio", site), float(expected))


def input_basis(model, params, examples, name):
    """The top directions of the input of one matrix in a network that has `params`."""
    network = type(model.network)(model.network.config).eval().requires_grad_(False)
    network.load_state_dict(params)
    axes, _ = input_axes(replace(model, network=network), examples, name)
    return axes[:, :K]


def test_centred_inputs_have_the_covariance_for_subspace(model, examples, params, at, generator):
    deltas = {}
    for name in ("L0.k", "L1.up"):
        axes, _ = input_axes(model, examples, name, centre=True)
        d_out = matrix_of(model, name).of(params).shape[0]
        deltas[name] = planted(axes[:, :K], d_out, generator, "read")
    after = moved(model, params, deltas)
    centred = RSF(centre_inputs=True).measurement(at(params))(after)
    uncentred = RSF().measurement(at(params))(after)
    for name in deltas:
        close(ratio(centred, name), D / K)
        assert ratio(uncentred, name) < 0.95 * D / K


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_the_knobs_of_the_unembedding_choose_the_prediction_subspace(
    model, params, at, generator, fold, centre
):
    params["lm_head.weight"] += 2 * torch.randn(D, generator=generator)  # a mean that matters
    params["gpt_neox.final_layer_norm.weight"] = 0.2 + 2 * torch.rand(D, generator=generator)
    axes = output_axes(params, centre, fold)
    delta = planted(axes[:, :K], D, generator, "write")
    after = moved(model, params, {"L0.o": delta})
    for other_fold in (False, True):
        for other_centre in (False, True):
            probe = RSF(fold_gain=other_fold, centre_unembedding=other_centre)
            measured = ratio(probe.measurement(at(params))(after), "L0.o")
            if (other_fold, other_centre) == (fold, centre):
                close(measured, D / K)
            else:
                assert measured < 0.95 * D / K


def test_tokens_and_length_say_on_what_text_the_inputs_are_taken(model, examples, params, at, generator):
    after = moved(model, params, noise(model, params, generator))
    rows = RSF(tokens=40, length=10).measurement(at(params))(after)
    assert {row["n"] for row in rows if row["quantity"] == "matched_ratio"} == {40}


@pytest.fixture
def olmo(tokenizer, generator):
    """An OLMo-2, which norms what attention and MLP write; the norms have gains."""
    config = Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    network = Olmo2ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4 + ("norm" in name))
    return LanguageModel(network, tokenizer, architecture_of(config))


def test_folding_a_post_norm_scales_what_is_written_by_its_gain(olmo, at, generator):
    before = {name: parameter.clone() for name, parameter in olmo.network.named_parameters()}
    after = moved(olmo, before, noise(olmo, before, generator))
    gain = "model.layers.0.post_attention_layernorm.weight"
    after[gain] = after[gain] + torch.randn(D, generator=generator)
    unembedding = before["lm_head.weight"] * before["model.norm.weight"]
    basis = np.linalg.svd((unembedding - unembedding.mean(0)).double().numpy(), full_matrices=False)[2][:K].T

    def expected(delta):
        return float(
            np.square(basis.T @ delta.double().numpy()).sum() / delta.double().square().sum() * D / K
        )

    o = "model.layers.0.self_attn.o_proj.weight"
    folded = after[gain][:, None] * after[o] - before[gain][:, None] * before[o]
    stored = after[o] - before[o]
    rows = {fold: RSF(fold_post_norm=fold).measurement(at(before, of=olmo))(after) for fold in (True, False)}
    close(ratio(rows[True], "L0.o"), expected(folded))
    close(ratio(rows[False], "L0.o"), expected(stored))
    assert abs(expected(folded) - expected(stored)) > 0.01
    close(value(rows[True], "L0.o", "delta_norm"), float(folded.norm()))
    # No norm stands behind a read.
    assert ratio(rows[True], "L0.q") == ratio(rows[False], "L0.q")


def test_a_gain_that_moved_alone_is_an_update_of_what_is_written(olmo, at):
    before = {name: parameter.clone() for name, parameter in olmo.network.named_parameters()}
    gain = "model.layers.0.post_feedforward_layernorm.weight"
    after = before | {gain: before[gain] + 1}
    for fold, moves in ((True, {"down"}), (False, set())):
        rows = RSF(fold_post_norm=fold).measurement(at(before, of=olmo))(after)
        assert {row["matrix"] for row in rows if row["quantity"] == "ratio"} == moves


@pytest.mark.parametrize("k", [None, 1, D, [1, D]])
def test_a_k_that_fits_is_let_through(model, k):
    RSF(k=k).check(model.architecture)


@pytest.mark.parametrize("k", [0, -1, D + 1, [4, D + 1], [0, 4], []])
def test_a_k_that_does_not_fit_is_refused(model, k):
    message = r"probe\.rsf\.k must be 1 to 32, the width of the residual stream, got "
    with pytest.raises(ValueError, match=message):
        RSF(k=k).check(model.architecture)


@pytest.mark.parametrize("trained", [True, False])
def test_a_training_from_stored_values_is_no_rounding_and_a_pair_may_be(model, examples, generator, trained):
    start = {name: weight.bfloat16() for name, weight in model.network.state_dict().items()}
    end = moved(
        model, {name: weight.float() for name, weight in start.items()}, noise(model, start, generator)
    )
    setting = Setting(model, start, end, False, examples, 0, CE() if trained else None, Training())
    rows = RSF(k=K, tokens=512, resamples=0, prompts=0).measurement(setting)(end)
    assert ("rounding_share" in {row["quantity"] for row in rows}) != trained
