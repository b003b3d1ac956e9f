from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from moving import matrix_of, moved
from networks import FORMS, language_model
from pydantic import ValidationError
from scipy import stats
from torch.testing import assert_close
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from weightgeom.causal.effects import Effects, Evaluation
from weightgeom.causal.trials import measured
from weightgeom.interfaces import Setting
from weightgeom.interventions.rank1 import Rank1
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.table import tabulate
from weightgeom.text.tokens import packed

EFFECTS = Effects(tokens=60, length=12, pairs=4, questions=5)
ALL = {"random": 3, "bottom": 2, "orthogonal": 2, "within": 2, "layer": 1}
TEXT: dict[str, Any] = {"tokens": 240, "length": 24}
SMALL = Rank1(controls={"random": 2, "layer": 1}, level=0.4, strengths=[0.1], effects=EFFECTS, **TEXT)


def setting(model, params, examples, end=None, **changed) -> Any:
    return replace(Setting(model, params, end or params, False, examples, 3), **changed)


def log_metrics(metrics, done):
    pass


def trials(asked, given, at_end=False) -> Any:
    """All trials, and the weights that they are tried on."""
    weights = given.end if at_end else given.start
    evaluation = Evaluation(given.model, weights, given.examples, asked.effects)
    return list(asked.trials(given, evaluation)), evaluation


def second_moment(model, params, examples, matrix):
    """E[a aᵀ] at the input of a matrix, from a network of its own."""
    rows = []
    network = model.with_weights(params).double()
    for batch in packed(examples.heldout, model.tokenizer, TEXT["length"], TEXT["tokens"]):
        keep = batch.attention_mask.bool()
        hook = network.get_submodule(matrix.module).register_forward_pre_hook(
            lambda module, given, keep=keep: rows.append(given[0].reshape(*keep.shape, -1)[keep])
        )
        network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hook.remove()
    a = torch.cat(rows)
    return a.T @ a / len(a)


def along(vector, expected, tolerance=1e-5):
    """Two unit vectors are the same direction, whatever the sign."""
    assert_close(abs(float(vector @ expected)), 1.0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("match", ["frobenius", "output"])
@pytest.mark.parametrize("name", FORMS)
def test_controls_have_the_norm_or_the_output_energy_of_their_treatment(name, match, tokenizer, examples):
    model, params = language_model(name, tokenizer)
    asked = replace(
        SMALL, matrices=["k", "up", "o", "down"], controls=ALL, match=match, direction="activation"
    )
    all_trials, evaluation = trials(asked, setting(model, params, examples))
    assert {trial.place["role"] for trial in all_trials} == {"read", "write"} and len(all_trials) == 8
    for trial in all_trials:
        matrix = matrix_of(model, f"L{trial.place['layer']}.{trial.place['matrix']}")
        C = second_moment(model, params, examples, matrix)
        sizes = []
        for arm in (trial.treatment, *trial.controls):
            edited = arm.edit.applied(evaluation.params)
            D = matrix.of(edited).double() - matrix.of(params).double()
            sizes.append(float(D.norm() if match == "frobenius" else (D @ C @ D.T).trace()))
        assert {arm.kind for arm in trial.controls} == ALL.keys()
        # The least energies are those of directions in which next to nothing comes in.
        tolerance = {"frobenius": 1e-6, "output": 1e-4}[match]
        assert sizes == pytest.approx([sizes[0]] * len(sizes), rel=tolerance, abs=0)
        if match == "frobenius":
            assert_close(sizes[0], 0.1 * float(matrix.of(params).norm()), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_with_a_treatment_drawn_as_its_controls_are_p_values_are_uniform(tokenizer, examples, monkeypatch):
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    network, generator = (
        GPTNeoXForCausalLM(config).eval().requires_grad_(False),
        torch.Generator().manual_seed(0),
    )
    for name, parameter in network.named_parameters():
        parameter.normal_(float("norm" in name and name.endswith("weight")), 0.25, generator=generator)
    model = LanguageModel(network, tokenizer, architecture_of(config))
    params = dict(network.named_parameters())
    effects = Effects(tokens=48, length=16, pairs=0, questions=0)
    asked = Rank1(
        ["k"], direction="random", strengths=[0.3], controls={"random": 4}, tokens=64, effects=effects
    )
    evaluation = Evaluation(model, params, examples, effects)
    moments = asked._moments(setting(model, params, examples), params, [matrix_of(model, "L0.k")])
    monkeypatch.setattr(Rank1, "_moments", lambda *given: moments)  # which no seed changes
    p_values = {"heldout_ce_change_p_value": [], "kl_from_unedited_p_value": []}
    for seed in range(500):
        of_seed = setting(model, params, examples, seed=seed)
        for row in measured(asked.trials(of_seed, evaluation), evaluation, seed, log_metrics):
            if row["quantity"] in p_values:
                p_values[row["quantity"]].append(row["value"])
    # p is uniform on 0.2, 0.4, ... 1, so that p less a uniform number up to 0.2 is uniform on [0, 1].
    steps = np.random.default_rng(0).uniform(0, 0.2, 500)
    for values in p_values.values():
        assert len(values) == 500
        assert stats.kstest(np.array(values) - steps, "uniform").pvalue > 0.01


def test_the_treatment_of_a_read_is_the_top_direction_of_its_input_and_of_a_write_that_of_the_unembedding(
    model, params, examples
):
    all_trials, _ = trials(
        replace(SMALL, matrices=["k", "o", "down", "up"]), setting(model, params, examples)
    )
    unembedding = params["lm_head.weight"].double()
    written = (unembedding - unembedding.mean(0)) * params["gpt_neox.final_layer_norm.weight"].double()
    prediction = torch.linalg.svd(written).Vh[0]
    assert [trial.place["layer"] for trial in all_trials] == [0, 0, 0, 0, 1, 1, 1, 1]
    for trial in all_trials:
        matrix = matrix_of(model, f"L{trial.place['layer']}.{trial.place['matrix']}")
        edit = trial.treatment.edit
        top = torch.linalg.eigh(second_moment(model, params, examples, matrix)).eigenvectors[:, -1]
        along(edit.v, top)  # of a write it is the shared side
        if matrix.role == "write":
            along(edit.u, prediction)
        expected = {"read": "activation", "write": "prediction"}[matrix.role]
        assert (trial.treatment.kind, trial.dose, trial.place["k"]) == (expected, "0.1", 4)
        for control in trial.controls:
            shared, varied = ("u", "v") if matrix.role == "read" else ("v", "u")
            assert getattr(control.edit, shared).equal(getattr(edit, shared))
            assert not getattr(control.edit, varied).equal(getattr(edit, varied))


@pytest.mark.parametrize("name", ["activation", "gradient", "delta"])
def test_a_control_of_another_layer_is_that_layers_direction(name, model, params, examples, generator):
    noise = {
        matrix.name: torch.randn(matrix.of(params).shape, generator=generator)
        for matrix in model.architecture.matrices
    }
    given = setting(model, params, examples, moved(model, params, noise))
    asked = replace(SMALL, matrices=["k", "o"], direction=name)
    by_place = {(t.place["layer"], t.place["matrix"]): t for t in trials(asked, given)[0]}
    alone = trials(replace(asked, layers=[1]), given)[0]  # where the other layer itself is not edited
    for kind, side in (("k", "v"), ("o", "u")):
        for layer in (0, 1):
            (control,) = [arm for arm in by_place[layer, kind].controls if arm.kind == "layer"]
            other = by_place[1 - layer, kind].treatment.edit
            along(getattr(control.edit, side), getattr(other, side), 1e-12)
        (single,) = [trial for trial in alone if trial.place["matrix"] == kind]
        (control,) = [arm for arm in single.controls if arm.kind == "layer"]
        along(getattr(control.edit, side), getattr(by_place[0, kind].treatment.edit, side), 1e-12)


def test_a_direction_that_is_the_same_in_every_layer_has_no_control_of_another_layer(model, params, examples):
    asked = replace(SMALL, matrices=["o"], controls=ALL)
    all_trials, _ = trials(asked, setting(model, params, examples))
    for trial in all_trials:
        assert {arm.kind for arm in trial.controls} == ALL.keys() - {"layer"}
    assert asked.arms(model.architecture) == sum(1 + len(trial.controls) for trial in all_trials)


@pytest.mark.parametrize("behaviour", ["heldout_ce", "preference_margin"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "olmo2", "gemma2"])
def test_the_gradients_pair_is_the_strongest_edit_to_first_order(name, behaviour, tokenizer, examples):
    model, params = language_model(name, tokenizer)
    asked = replace(SMALL, matrices=["k", "o", "down"], direction="gradient", behaviour=behaviour)
    all_trials, evaluation = trials(asked, setting(model, params, examples))
    for trial in all_trials:
        matrix = matrix_of(model, f"L{trial.place['layer']}.{trial.place['matrix']}")
        G = matrix.of(evaluation.gradients([matrix.parameter])[behaviour]).double()
        strongest = trial.treatment.edit.alpha * float(torch.linalg.matrix_norm(G, 2))
        assert_close(trial.treatment.predicted[behaviour], strongest, rtol=1e-5, atol=0)
        assert all(abs(arm.predicted[behaviour]) < strongest for arm in trial.controls)


@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_behind_a_norm_the_direction_is_that_of_what_reaches_the_stream(name, tokenizer, examples):
    model, params = language_model(name, tokenizer)
    all_trials, _ = trials(
        replace(SMALL, matrices=["o", "down"], controls=ALL), setting(model, params, examples)
    )
    gain = model.architecture.final_norm.gain(params).double()
    unembedding = model.architecture.unembedding(params).double()
    prediction = torch.linalg.svd((unembedding - unembedding.mean(0)) * gain).Vh
    for trial in all_trials:
        matrix = matrix_of(model, f"L{trial.place['layer']}.{trial.place['matrix']}")
        assert matrix.norm is not None
        directions = {
            "treatment": trial.treatment,
            "bottom": next(c for c in trial.controls if c.kind == "bottom"),
        }
        for kind, arm in directions.items():
            reaches = matrix.norm.gain(params).double() * arm.edit.u
            along(reaches / reaches.norm(), prediction[0 if kind == "treatment" else -1])
        for arm in trial.controls:
            reaches = matrix.norm.gain(params).double() * arm.edit.u
            share = float((prediction[:4] @ reaches).square().sum() / reaches.square().sum())
            if arm.kind in ("within", "orthogonal"):
                assert_close(share, float(arm.kind == "within"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt_neox", "olmo2"])
def test_a_planted_update_is_the_direction_delta(name, tokenizer, examples, generator):
    model, params = language_model(name, tokenizer)
    u, v = (torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0) for _ in range(2))
    matrix = matrix_of(model, "L1.up")
    out = torch.randn(40, generator=generator)
    update = {"L1.up": torch.outer(out, v)}
    if name == "gpt_neox":
        update["L1.o"] = torch.outer(u, v)
    given = setting(model, params, examples, moved(model, params, update))
    asked = replace(SMALL, matrices=["up"], layers=[1], direction="delta", controls={"random": 2})
    ((trial,), _) = trials(asked, given)
    along(trial.treatment.edit.v, v.double())
    along(trial.treatment.edit.u, (out / out.norm()).double())
    if name == "gpt_neox":
        ((trial,), _) = trials(replace(asked, matrices=["o"]), given)
        along(trial.treatment.edit.u, u.double())
        along(trial.treatment.edit.v, v.double())
    with pytest.raises(ValueError, match=r"the delta of L0\.up is zero: it has no top singular pair"):
        trials(replace(asked, layers=[0]), given)
    assert matrix.name == "L1.up"


@pytest.mark.parametrize("shared", ["gradient", "delta", "random", "input"])
def test_the_shared_side_is_what_is_asked_for(shared, model, params, examples, generator):
    update = torch.randn(32, 32, generator=generator)
    given = setting(model, params, examples, moved(model, params, {"L1.o": update}))
    asked = replace(SMALL, matrices=["o"], layers=[1], shared=shared)
    ((trial,), evaluation) = trials(asked, given)
    matrix, v = matrix_of(model, "L1.o"), trial.treatment.edit.v
    G = matrix.of(evaluation.gradients([matrix.parameter])["heldout_ce"]).double()
    expected = {
        "gradient": torch.linalg.svd(G).Vh[0],
        "delta": torch.linalg.svd(update.double()).Vh[0],
        "input": torch.linalg.eigh(second_moment(model, params, examples, matrix)).eigenvectors[:, -1],
    }
    for name, vector in expected.items():
        assert (abs(float(v @ vector)) > 1 - 1e-5) == (name == shared)


def test_a_direction_from_a_file_is_called_file(model, params, examples, tmp_path, generator):
    vector = torch.randn(32, generator=generator, dtype=torch.float64)
    np.save(tmp_path / "x.npy", vector.numpy())
    asked = replace(SMALL, matrices=["k", "o"], layers=[0], direction=str(tmp_path / "x.npy"))
    asked.check(model.architecture)
    (read, write), _ = trials(asked, setting(model, params, examples))
    along(read.treatment.edit.v, vector / vector.norm(), 1e-12)
    along(write.treatment.edit.u, vector / vector.norm(), 1e-12)
    assert read.treatment.kind == "file"


def test_strengths_are_shares_of_the_norm_or_absolute(model, params, examples):
    norm = float(params["gpt_neox.layers.0.attention.dense.weight"].norm())
    for relative, scale in ((True, norm), (False, 1.0)):
        asked = replace(SMALL, matrices=["o"], layers=[0], strengths=[0.2, 0.01], relative=relative)
        all_trials, _ = trials(asked, setting(model, params, examples))
        assert [trial.dose for trial in all_trials] == ["0.2", "0.01"]
        alphas = [trial.treatment.edit.alpha for trial in all_trials]
        assert alphas == pytest.approx([0.2 * scale, 0.01 * scale], rel=1e-6)


def test_the_rows_say_what_every_arm_did_and_leave_the_weights_alone(model, params, examples):
    before = {name: weight.clone() for name, weight in params.items()}
    asked, steps = replace(SMALL, controls=ALL, strengths=[0.1, 0.3]), []
    rows = asked.rows(setting(model, params, examples), lambda metrics, done: steps.append(done))
    assert all(weight.equal(before[name]) for name, weight in params.items())
    # Two layers, two strengths: k with 1 + 10 arms, o with 1 + 9, as one direction serves all of its layers
    assert asked.arms(model.architecture) == 84 == steps[-1] == len(steps)
    table: Any = tabulate(rows)
    assert table[~table["arm"].str.contains("/")]["arm"].nunique() == 2 * (1 + 10 + 1)
    measured_kl = table[table["quantity"] == "kl_from_unedited"]
    assert len(measured_kl) == 84 and (measured_kl["value"] > 0).all() and (table["step"] == 0).all()
    for suffix in ("p_value", "q_value"):
        part = table[table["quantity"] == f"kl_from_unedited_{suffix}"]
        # k and o, two layers, two strengths, against random, bottom, orthogonal and within
        assert len(part) == 8 * 4 and part["arm"].str.contains("/").all()
    forecast = table[table["quantity"] == "predicted_heldout_ce_change"]
    assert len(forecast) == 84 and set(forecast["unit"]) == {"nats/token"}
    again: Any = tabulate(asked.rows(setting(model, params, examples), log_metrics))
    assert again.equals(table)
    other: Any = tabulate(asked.rows(setting(model, params, examples, seed=4), log_metrics))
    assert not other["value"].equals(table["value"])


@pytest.mark.parametrize(
    ("at", "from_random", "end"),
    [("auto", False, False), ("auto", True, True), ("start", True, False), ("end", False, True)],
)
def test_the_model_that_is_edited_is_the_one_asked_for(
    at, from_random, end, model, params, examples, generator
):
    other = moved(model, params, {"L0.k": torch.randn(32, 32, generator=generator)})
    given = setting(model, params, examples, other, from_random=from_random, last=7)
    rows = replace(SMALL, at=at, matrices=["o"], layers=[1]).rows(given, log_metrics)
    expected = replace(SMALL, matrices=["o"], layers=[1]).rows(
        setting(model, other if end else params, examples), log_metrics
    )
    step = 7 if end else 0
    assert rows == [{**row, "step": step} for row in expected]


def test_a_direction_in_which_the_input_is_large_does_more_than_all_random_ones(model, params, examples):
    # Planted: all tokens of the text differ from the others by one direction, whose effect is to be found.
    embed = params["gpt_neox.embed_in.weight"]
    spike = torch.nn.functional.normalize(torch.arange(1.0, 33.0) - 16.5, dim=0)
    planted = {**params, "gpt_neox.embed_in.weight": embed + 20 * embed[:, :1] * spike}
    asked = replace(SMALL, matrices=["v"], layers=[0], controls={"random": 19}, strengths=[0.3])
    rows = asked.rows(setting(model, planted, examples), log_metrics)
    p = [row["value"] for row in rows if row["quantity"] == "kl_from_unedited_p_value"]
    assert p == [0.05]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strengths": [0.1, 0.0]}, r"strengths must be positive and finite, got 0\.0"),
        ({"strengths": [-1.0]}, r"strengths must be positive and finite, got -1\.0"),
        ({"strengths": [float("inf")]}, "strengths must be positive and finite, got inf"),
        ({"strengths": [float("nan")]}, "strengths must be positive and finite, got nan"),
        ({"controls": {"random": 39, "within": -1}}, r"controls\.within must be 0 or more, got -1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Rank1(**changed)


@pytest.mark.parametrize(
    "changed", [{"strengths": []}, {"matrices": []}, {"controls": {"top": 1}}, {"level": 1.0}]
)
def test_settings_out_of_range_are_refused(changed):
    with pytest.raises(ValidationError):
        Rank1(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"controls": {"random": 18}},
            r"18 random controls give p-values of 0\.0526 at the least.* 19 or more",
        ),
        (
            {"level": 0.01},
            r"39 random controls give p-values of 0\.025 .* level is 0\.01: ask for 99 or more",
        ),
        ({"controls": {"bottom": 50}}, "0 random controls give p-values of 1 at the least"),
        ({"layers": [0, 2]}, "there is no layer 2: the model has layers 0 to 1"),
        ({"layers": [-1]}, "there is no layer -1: the model has layers 0 to 1"),
        ({"layers": []}, "layers is empty"),
        ({"matrices": ["gate"]}, "the model has no matrix gate; it has down, k, o, q, up, v"),
        (
            {"direction": "top"},
            "no direction 'top': give one of activation, prediction, gradient, delta, random",
        ),
        (
            {"direction": "long.npy"},
            r"long\.npy has shape \(33,\), and the residual stream that L0\.k reads is 32",
        ),
        ({"direction": "zero.npy"}, r"the direction in zero\.npy is zero: it has no direction"),
        ({"direction": "nan.npy"}, r"the direction in nan\.npy is not finite: it has no direction"),
        ({"shared": "input"}, r"shared=input is the input's side, which is the varied side of L0\.k"),
        ({"controls": {"random": 39, "layer": 2}}, r"controls\.layer is 2, and there are 1 other layers"),
        (
            {"controls": {"random": 39, "bottom": 33}},
            r"controls\.bottom is at most 32, the width of the stream",
        ),
        ({"k": 33}, r"intervention\.rank1\.k must be 1 to 32, the width of the residual stream, got 33"),
        ({"k": 32}, "nothing is orthogonal to a subspace of k=32, the whole stream: lower k"),
        ({"match": "output", "tokens": 31}, r"match=output needs .* singular on 31 tokens .* 32 wide: raise"),
        (
            {"direction": "gradient", "behaviour": "preference_margin", "effects": Effects(pairs=0)},
            r"the gradient of preference_margin needs pairs: raise intervention\.rank1\.effects\.pairs",
        ),
        (
            {"shared": "gradient", "behaviour": "preference_margin", "effects": Effects(pairs=0)},
            "the gradient of preference_margin needs pairs",
        ),
    ],
)
def test_what_the_model_does_not_allow_is_refused_before_anything_is_computed(
    changed, message, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    np.save("long.npy", np.ones(33))
    np.save("zero.npy", np.zeros(32))
    np.save("nan.npy", np.full(32, np.nan))
    monkeypatch.setattr(GPTNeoXForCausalLM, "forward", None)
    with pytest.raises(ValueError, match=message):
        Rank1(**changed).check(model.architecture)


def test_what_the_model_allows_is_not_refused(model):
    Rank1().check(model.architecture)
    Rank1(k=32, controls={"random": 19}).check(model.architecture)
    Rank1(match="output", tokens=32, matrices=["o"], shared="input").check(model.architecture)


def test_a_gradient_of_pairs_that_the_data_lack_is_refused_before_anything_is_computed(
    model, params, examples, monkeypatch
):
    monkeypatch.setattr(GPTNeoXForCausalLM, "forward", None)
    asked = replace(SMALL, direction="gradient", behaviour="preference_margin")
    given = setting(model, params, replace(examples, heldout_pairs=[]))
    with pytest.raises(ValueError, match=r"the gradient of preference_margin needs pairs: .* data hold none"):
        asked.rows(given, log_metrics)


def test_a_direction_in_which_nothing_comes_in_cannot_be_matched_by_output(model, params, examples):
    # Without its bias a LayerNorm's output over its gain sums to 0.
    for layer in (0, 1):
        params[f"gpt_neox.layers.{layer}.input_layernorm.bias"].zero_()
    given = setting(model, params, examples)
    asked = replace(SMALL, matrices=["k"], match="output", controls={"random": 2, "bottom": 1})
    asked.check(model.architecture)
    message = (
        r"match=output: the covariance of the inputs of L0\.k is singular along a direction of the trial"
    )
    with pytest.raises(ValueError, match=message):
        asked.rows(given, log_metrics)
    trials(replace(asked, controls={"random": 2}), given)
    trials(replace(asked, match="frobenius"), given)


def test_what_the_last_layer_does_not_allow_is_refused_before_the_first_arm(model, params, examples):
    params["gpt_neox.layers.1.input_layernorm.bias"].zero_()
    asked = replace(SMALL, matrices=["k"], match="output", controls={"random": 2, "bottom": 1})
    done = []
    with pytest.raises(ValueError, match=r"the inputs of L1\.k is singular"):
        asked.rows(setting(model, params, examples), lambda metrics, arms: done.append(arms))
    assert done == []
