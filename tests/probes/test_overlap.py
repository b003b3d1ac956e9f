from math import cos, radians, sin, sqrt

import numpy as np
import pytest
import torch
from moving import matrix_of, moved
from safetensors.torch import save_file
from scipy.linalg import subspace_angles
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.estimators.reference_subspaces import Inputs, input_frames, prediction_frame
from weightgeom.geometry.nulls import null_ratio_sd
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.overlap import Checkpoints, Overlap
from weightgeom.table import own, tabulate
from weightgeom.training.config import Training

D, K = 32, 4  # d_model and the default k, d/8
COMMON = {"overlap", "overlap_ratio", "null_ratio_mean", "null_ratio_sd", "mean_angle", "largest_angle"}
GRADIENTS = {
    "delta:gradient_before",
    "delta:upstream_before",
    "gradient_before:prediction",
    "upstream_before:prediction",
}
TRAINING = Training(max_length=48)


def jittered(params, generator, scale=0.05):
    return {
        name: weight + scale * torch.randn(weight.shape, generator=generator)
        for name, weight in params.items()
    }


def planted(basis, matrix, params, generator):
    """A delta of one matrix whose side at the residual stream lies in the span of the basis."""
    d_out, d_in = matrix.of(params).shape
    other = d_out if matrix.role == "read" else d_in
    inside = basis @ torch.randn(basis.shape[1], other, generator=generator, dtype=torch.float64)
    return inside.T if matrix.role == "read" else inside


def values(rows, name, pair):
    """The quantities of one pair at one matrix."""
    return {
        row["quantity"]: row["value"]
        for row in rows
        if f"L{row.get('layer', '')}.{row['matrix']}" == name and row["subspace"] == pair
    }


def same(quantities, **expected):
    # Inputs and weights are fp32, and the delta is a difference of fp32 weights: the subspace turns by
    # 1e-6 over the gap of its spectrum, some 1e-5 radians or 1e-3 degrees, and the overlap by its square.
    for quantity, number in expected.items():
        assert_close(
            quantities[quantity], float(number), rtol=1e-4, atol=5e-3 if "angle" in quantity else 1e-6
        )


def test_deltas_planted_in_what_the_model_reads_overlap_with_it_wholly(model, params, at, generator):
    bases = {frame.place: frame.space.basis for frame in input_frames(at(params), params, K, Inputs())}
    deltas = {}
    for matrix in model.architecture.matrices:
        if matrix.role == "read":
            site = "mlp_input" if matrix.kind == "up" else "attention_input"
            deltas[matrix.name] = planted(bases[site, matrix.layer], matrix, params, generator)
    pairs = ["delta:attention_input_before", "delta:mlp_input_before"]
    rows = Overlap(pairs=pairs).measurement(at(params))(moved(model, params, deltas))
    for name in deltas:
        mine, others = pairs[::-1] if name.endswith("up") else pairs
        same(values(rows, name, mine), overlap=1, overlap_ratio=D / K, mean_angle=0, largest_angle=0)
        assert values(rows, name, others)["overlap"] < 0.9
    assert not values(rows, "L0.o", pairs[0])  # it did not move


def test_the_inputs_are_those_of_the_checkpoint_but_with_a_suffix_those_of_the_start(
    model, params, at, generator
):
    setting = at(params, jittered(params, generator, 0.3))
    after = jittered(params, generator, 0.3)
    rows = Overlap(pairs=["weight:mlp_input", "weight:mlp_input_before"]).measurement(setting)(after)
    weight = matrix_of(model, "L1.q").of(after).double()
    right = torch.linalg.svd(weight).Vh[:K].T
    for pair, inputs in (("weight:mlp_input", after), ("weight:mlp_input_before", params)):
        bases = {frame.place: frame.space.basis for frame in input_frames(setting, inputs, K, Inputs())}
        basis = bases["mlp_input", 1]
        same(values(rows, "L1.q", pair), overlap=(right.T @ basis).square().sum() / K)


@pytest.mark.parametrize("inside", [True, False])
def test_deltas_planted_inside_or_outside_the_prediction_subspace_are_at_0_or_90_degrees(
    model, params, at, generator, inside
):
    everything = prediction_frame(at(params), params, D).space.basis
    basis = everything[:, :K] if inside else everything[:, K:]
    writes = [matrix for matrix in model.architecture.matrices if matrix.role == "write"]
    deltas = {matrix.name: planted(basis, matrix, params, generator) for matrix in writes}
    rows = Overlap(pairs=["delta:prediction"]).measurement(at(params))(moved(model, params, deltas))
    for name in deltas:
        angle = 0 if inside else 90
        quantities = values(rows, name, "delta:prediction")
        same(quantities, overlap=inside, overlap_ratio=inside * D / K, mean_angle=angle, largest_angle=angle)


@pytest.mark.parametrize("name", ["L0.q", "L1.up", "L0.o", "L1.down"])
def test_a_rotation_of_the_top_singular_vectors_by_a_known_angle_is_found(model, params, at, generator, name):
    matrix = matrix_of(model, name)
    d_out, d_in = matrix.of(params).shape
    small = min(d_out, d_in)
    left, right = (
        torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for d in (d_out, d_in)
    )
    singular = torch.tensor([4.0] * K + [1.0] * (small - K), dtype=torch.float64)
    # Every one of the top K directions of the residual side turns towards one of the next K.
    angle = radians(25)
    turn = torch.eye(D, dtype=torch.float64)
    for i in range(K):
        turn[i, i] = turn[K + i, K + i] = cos(angle)
        turn[i, K + i], turn[K + i, i] = -sin(angle), sin(angle)

    def weight(left, right):
        return (left[:, :small] * singular @ right[:, :small].T).float()

    start = matrix.replaced(params, weight(left, right))
    turned = (left, right @ turn) if matrix.role == "read" else (left @ turn, right)
    rows = Overlap(pairs=["weight:weight_before"]).measurement(at(start))(
        matrix.replaced(params, weight(*turned))
    )
    quantities = values(rows, name, "weight:weight_before")
    same(quantities, overlap=cos(angle) ** 2, mean_angle=25, largest_angle=25)
    assert quantities["rotation"] == quantities["mean_angle"]
    other = next(other.name for other in model.architecture.matrices if other.module != matrix.module)
    same(values(rows, other, "weight:weight_before"), overlap=1, overlap_ratio=D / K, mean_angle=0)


def test_the_overlap_of_uniform_subspaces_has_the_exact_mean_and_deviation(generator):
    d, n = 12, 20_000
    for k, other in ((3, 3), (2, 5), (1, 7)):
        bases = torch.linalg.qr(torch.randn(n, d, other, generator=generator, dtype=torch.float64)).Q
        ratios = bases[:, :k].square().sum((1, 2)) * d / (k * other)  # against the first k axes
        sd = null_ratio_sd(d, k, other)
        # Five standard errors: of a mean sd/√n, and of a variance at most √(5/n) of it for a kurtosis
        # up to 6, so half of that of the deviation.
        assert abs(ratios.mean().item() - 1) < 5 * sd / sqrt(n)
        assert abs(ratios.std().item() / sd - 1) < 5 * sqrt(5 / n) / 2


def test_the_null_of_a_line_is_that_of_a_beta_and_of_the_whole_space_has_no_spread():
    # Beta(l/2, (d-l)/2) has mean l/d and variance 2 l (d-l) / (d² (d+2)); here l = 3, d = 8.
    assert_close(null_ratio_sd(8, 1, 3), sqrt(2 * 3 * 5 / (64 * 10)) * 8 / 3)
    assert null_ratio_sd(8, 8, 3) == null_ratio_sd(1, 1, 1) == 0


@pytest.mark.slow
def test_unrelated_deltas_are_at_chance_with_each_other(model, params, at, generator):
    matrix = matrix_of(model, "L1.q")
    noise = [0.1 * torch.randn(D, D, generator=generator) for _ in range(400)]
    deltas = {"L1.q": torch.randn(D, D, generator=generator)}
    setting = at(params, moved(model, params, deltas))
    measure = Overlap(pairs=["delta:delta_end"]).measurement(setting)
    draws = [
        values(measure(moved(model, params, {matrix.name: delta})), matrix.name, "delta:delta_end")
        for delta in noise
    ]
    # The top right singular vectors of a Gaussian matrix are Haar-uniform: five standard errors.
    sd = draws[0]["null_ratio_sd"]
    assert_close(sd, (D - K) / K * sqrt(2 / ((D - 1) * (D + 2))))
    mean = np.mean([draw["overlap_ratio"] for draw in draws])
    assert abs(mean - 1) < 5 * sd / sqrt(400)
    assert {draw["null_ratio_mean"] for draw in draws} == {1.0}


def test_angles_are_those_of_the_singular_subspaces(model, params, at, generator):
    after = jittered(params, generator)
    end = jittered(params, generator)
    rows = Overlap(k=6, pairs=["delta:delta_end"]).measurement(at(params, end))(after)
    for name in ("L0.v", "L1.down"):
        matrix = matrix_of(model, name)
        vectors = []
        for weights in (after, end):
            delta = (matrix.of(weights) - matrix.of(params)).double().numpy()
            left, _, right = np.linalg.svd(delta)
            vectors.append(right[:6].T if matrix.role == "read" else left[:, :6])
        angles = np.rad2deg(subspace_angles(*vectors))
        cosines = np.linalg.svd(vectors[0].T @ vectors[1], compute_uv=False)
        quantities = values(rows, name, "delta:delta_end")
        same(quantities, overlap=(cosines**2).mean(), mean_angle=angles.mean(), largest_angle=angles.max())


def test_a_step_down_the_gradient_has_the_gradients_subspace(model, examples, params, at):
    gathering = Gathering(prompts=6, inputs=False)
    (gathered_pass,) = gradient_moments(model, params, DPO(), TRAINING, examples, gathering, seed=3)
    after = dict(params)
    for name, gradient in gathered_pass.gradients.items():
        after[name] = params[name] - gradient.value / gradient.value.abs().max()
    probe = Overlap(pairs=["delta:gradient_before", "delta:gradient"], prompts=6)
    rows = probe.measurement(at(params, objective=DPO()))(after)
    for matrix in model.architecture.matrices:
        same(values(rows, matrix.name, "delta:gradient_before"), overlap=1)
        assert values(rows, matrix.name, "delta:gradient")["overlap"] < 0.99  # far from where it was taken


def test_a_delta_planted_in_the_upstream_gradients_overlaps_with_them(model, examples, params, at, generator):
    gathering = Gathering(prompts=6, inputs=False)
    (gathered_pass,) = gradient_moments(model, params, DPO(), TRAINING, examples, gathering, seed=3)
    deltas = {
        name: planted(Subspace.top(moment.value, K).basis, matrix_of(model, name), params, generator)
        for name, moment in gathered_pass.upstream.items()
    }
    probe = Overlap(pairs=["delta:upstream_before"], prompts=6)
    rows = probe.measurement(at(params, objective=DPO()))(
        moved(model, params, {**deltas, "L0.q": torch.randn(D, D, generator=generator)})
    )
    for name in deltas:
        same(values(rows, name, "delta:upstream_before"), overlap=1, largest_angle=0)
    assert {row["matrix"] for row in rows} == {"o", "down"}  # q has no output in the stream


def test_the_next_layer_is_that_of_the_same_kind(model, params, at, generator):
    shared, beside = (torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q).split(
        D // 2, 1
    )
    deltas = {
        name: planted(basis[:, :K], matrix_of(model, name), params, generator)
        for name, basis in {"L0.q": shared, "L1.q": shared, "L0.o": shared, "L1.o": beside}.items()
    }
    rows = Overlap(pairs=["delta:delta_next_layer"]).measurement(at(params))(moved(model, params, deltas))
    pair = "delta:delta_next_layer"
    same(values(rows, "L0.q", pair), overlap=1)
    same(values(rows, "L0.o", pair), overlap=0, mean_angle=90)
    assert {row["layer"] for row in rows} == {0}  # the last has none


def test_the_delta_of_other_checkpoints_is_read_from_their_directories(
    model, params, at, generator, tmp_path
):
    start = jittered(params, generator)
    deltas = {
        "L0.q": torch.randn(D, D, generator=generator),
        "L1.down": torch.randn(D, 48, generator=generator),
    }
    for name, weights in (("before", start), ("after", moved(model, start, deltas))):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    other = Checkpoints(str(tmp_path / "before"), str(tmp_path / "after"))
    probe = Overlap(pairs=["delta:delta_other"], other=other)
    probe.check(model.architecture)
    rows = probe.measurement(at(params))(moved(model, params, deltas))
    for name in deltas:  # the same update of another model
        same(values(rows, name, "delta:delta_other"), overlap=1)
    assert {row["matrix"] for row in rows} == {"q", "down"}


def test_a_delta_of_low_rank_counts_with_the_directions_that_it_has(model, params, at, generator):
    basis = prediction_frame(at(params), params, K).space.basis
    delta = planted(basis[:, :2], matrix_of(model, "L0.o"), params, generator)
    rows = Overlap(pairs=["delta:prediction"]).measurement(at(params))(moved(model, params, {"L0.o": delta}))
    # ‖Uᵀ V‖² = 2 of the 2 possible; its expectation is 2 · 4 / 32, so the ratio is again d/k = 8.
    quantities = values(rows, "L0.o", "delta:prediction")
    same(quantities, overlap=1, overlap_ratio=D / K, largest_angle=0)
    assert_close(quantities["null_ratio_sd"], null_ratio_sd(D, 2, K))
    assert {row["n"] for row in rows} == {2} and {row["k"] for row in rows} == {K}


def test_keys_of_one_shared_head_count_with_their_rows(tokenizer, examples, generator):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    model = LanguageModel(network, tokenizer, architecture_of(config))
    params = {name: weight.clone() for name, weight in network.named_parameters()}
    setting = Setting(model, params, params, False, examples, 3)
    probe = Overlap(k=16, pairs=["weight:weight_before"])
    rows = probe.measurement(setting)(jittered(params, generator, 1e-4))
    angles = {row["matrix"]: row["n"] for row in rows}
    assert angles == {"q": 16, "k": 8, "v": 8, "o": 16, "gate": 16, "up": 16, "down": 16}
    table = tabulate([row | {"step": 1} for row in rows])
    assert set(own(table, Overlap().declaration.headline)["matrix"]) == set(angles)


def test_every_quantity_is_there_with_its_place_unit_and_number_of_samples(model, params, at, generator):
    for known in (False, True):
        setting = at(params, jittered(params, generator), objective=DPO() if known else None)
        probe = Overlap(prompts=4, tokens=300)
        rows = probe.measurement(setting)(jittered(params, generator))
        table = tabulate([row | {"step": 1} for row in rows])
        absent = {"delta:mixer_input"} | (set() if known else GRADIENTS)  # all layers have softmax attention
        assert set(table["subspace"]) == set(probe.pairs) - absent
        for pair, part in table.groupby("subspace"):
            rotation = {"rotation"} if pair == "weight:weight_before" else set()
            assert set(part["quantity"]) == COMMON | rotation
        degrees = table["quantity"].isin(["mean_angle", "largest_angle", "rotation"])
        assert set(table[degrees]["unit"]) == {"degree"} and set(table[~degrees]["unit"]) == {"1"}
        assert set(table["n"]) == set(table["k"]) == {K}
        # A run logs one headline for each matrix and layer.
        headline = own(table, Overlap().declaration.headline)
        assert sorted(zip(headline["layer"], headline["matrix"], strict=True)) == sorted(
            (matrix.layer, matrix.kind) for matrix in model.architecture.matrices
        )


def test_pairs_of_inputs_and_of_predictions_have_one_row_for_each_place(model, params, at, generator):
    pairs = ["attention_input:attention_input_before", "mlp_input:prediction", "prediction:prediction_before"]
    rows = Overlap(pairs=pairs, tokens=300).measurement(at(params))(jittered(params, generator))
    tabulate([row | {"step": 1} for row in rows])  # refuses what a table cannot hold
    overlaps = [row for row in rows if row["quantity"] == "overlap"]
    places = [(row["subspace"], row["matrix"], row.get("layer")) for row in overlaps]
    assert places == [
        *[(pairs[0], "q", layer) for layer in (0, 1)],
        *[(pairs[1], "up", layer) for layer in (0, 1)],
        (pairs[2], "unembed", None),
    ]
    assert all(row["value"] < 1 - 1e-6 for row in overlaps)


def test_without_an_update_nothing_has_turned_and_no_delta_is_compared(params, at):
    rows = Overlap().measurement(at(params))(params)
    assert {row["subspace"] for row in rows} == {"weight:weight_before"}
    same(values(rows, "L1.o", "weight:weight_before"), overlap=1, rotation=0)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("delta", "a pair is one:other, such as delta:prediction, got 'delta'"),
        ("delta:weights", "unknown subspace 'weights'; there are attention_input, .*, weight, each alone or"),
        ("weight:delta_before", "there is no delta_before: the start has no update"),
        ("delta:prediction_next_layer", "there is no prediction_next_layer: .* no layer predicts"),
        ("delta:delta_other", r"the pair delta:delta_other needs probe\.overlap\.other={before: DIR"),
    ],
)
def test_a_pair_that_there_is_not_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        Overlap(pairs=[pair])


@pytest.mark.parametrize("k", [0, D + 1])
def test_a_k_that_does_not_fit_is_refused(model, k):
    with pytest.raises(ValueError, match=rf"probe\.overlap\.k must be 1 to 32.*, got {k}"):
        Overlap(k=k).check(model.architecture)


def test_a_directory_that_is_not_there_is_refused(model, tmp_path):
    other = Checkpoints(str(tmp_path), str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"probe\.overlap\.other\.after is no directory: .*missing"):
        Overlap(other=other).check(model.architecture)


def test_a_k_that_fits_is_let_through(model):
    Overlap(k=D).check(model.architecture)
