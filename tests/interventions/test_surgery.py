# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import pytest
import torch
from moving import matrix_of, moved
from networks import FORMS, language_model
from torch.testing import assert_close

from weightgeom.analysis.summaries import by_treatment
from weightgeom.causal.edits import Surgery, Transplant, residual_side
from weightgeom.causal.effects import Effects, Evaluation
from weightgeom.causal.matrix_groups import group_of, kinds_of, reads_and_writes
from weightgeom.causal.matrix_groups import moved as moving_groups
from weightgeom.estimators.reference_subspaces import Inputs, input_frames, place_of, prediction_frame
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.interventions.surgery import DeltaSurgery, filled, haar_basis
from weightgeom.table import tabulate

SMALL = Effects(tokens=64, length=32, pairs=2, questions=2)
TWO = {"random_k": 2, "random_energy": 2, "rotated": 2}


def surgery(**asked) -> DeltaSurgery:
    """Few controls and small effects, unless asked for otherwise."""
    return DeltaSurgery(**{"controls": TWO, "level": 0.5, "tokens": 256, "effects": SMALL, **asked})


def setting(model, examples, start, end, from_random=False) -> Setting:
    return Setting(model, start, end, from_random, examples, 3, last=7)


def shaken(params, generator):
    """Every parameter moved a little."""
    return {
        key: weight + torch.randn(weight.shape, generator=generator) / 50 for key, weight in params.items()
    }


def both(asked, at):
    """The trials of a surgery at the end, and of the transplants at the start, each with its evaluation."""
    architecture = at.model.architecture
    end, start = (Evaluation(at.model, weights, at.examples, SMALL) for weights in (at.end, at.start))
    groups, transplants = moving_groups(at, asked._groups(architecture), asked._transplants(architecture))
    return [*asked.surgeries(at, end, groups)], end, [*asked.transplanted(at, start, transplants)], start


def cut(arm) -> Surgery:
    assert isinstance(arm.edit, Surgery)
    return arm.edit


def transplant(arm) -> Transplant:
    assert isinstance(arm.edit, Transplant)
    return arm.edit


def inside_of(at, matrix, k):
    """The top k directions of what a matrix reads, or of the unembedding."""
    frames = {frame.place: frame for frame in input_frames(at, at.start, k, Inputs(tokens=256))}
    frames["prediction", None] = prediction_frame(at, at.start, k)
    return frames[place_of(matrix)].space.basis


def test_directions_are_filled_up_to_an_energy() -> None:
    sums = torch.tensor([2.0, 5.0, 9.0]).double()
    # 6 = 2 + 3 + c⁴ 4, so c⁴ = 1/4; 1 = c⁴ 2; 5 and 9 need none in part.
    assert filled(sums, 6.0) == (3, pytest.approx(0.25**0.25))
    assert filled(sums, 1.0) == (1, pytest.approx(0.5**0.25))
    assert filled(sums, 5.0) == (2, 1.0)
    assert filled(sums, 9.0 + 1e-12) == (3, 1.0)
    assert filled(sums, 0.0) == (1, 0.0)


def test_haar_directions_are_orthogonal_and_the_first_of_them_the_same() -> None:
    whole, first = haar_basis("a", 20, None), haar_basis("a", 20, 5)
    assert_close(whole.T @ whole, torch.eye(20).double())
    assert_close(whole[:, :5], first)
    assert not torch.allclose(haar_basis("b", 20, 5), first)


def test_the_signs_of_a_haar_matrix_are_not_those_of_a_factorisation() -> None:
    # LAPACK's Q has a negative first entry for every positive Gaussian one; Haar, its sign is a coin.
    firsts = torch.stack([haar_basis(f"sign {draw}", 4, None).diagonal() for draw in range(400)])
    # The mean of a diagonal entry is 0 and its variance 1/4: 400 draws have sd 0.025, the bound is five.
    assert bool((firsts.mean(0).abs() < 0.125).all())


def test_an_update_planted_inside_is_removed_whole_and_kept_whole(model, params, examples, generator) -> None:
    at = setting(model, examples, params, params)
    k, o = matrix_of(model, "L1.k"), matrix_of(model, "L0.o")
    deltas = {
        "L1.k": torch.randn(32, 4, generator=generator).double() @ inside_of(at, k, 4).T / 10,
        "L0.o": inside_of(at, o, 4) @ torch.randn(4, 32, generator=generator).double() / 10,
    }
    end = moved(model, params, deltas)
    at = setting(model, examples, params, end)
    cuts, evaluation, *_ = both(surgery(groups=[["k"], ["o"]], k=4, transplants=[]), at)
    for trial, matrix, outcome in zip(cuts, [k, k, o, o], [params, end, params, end], strict=True):
        edited = trial.treatment.edit.applied(evaluation.params)
        # The rounding of the planted update to fp32 lies outside.
        assert_close(matrix.of(edited), matrix.of(outcome), rtol=2e-7, atol=2e-7)
        for control in trial.controls:
            if control.kind == "random_k":
                assert not torch.allclose(
                    matrix.of(control.edit.applied(evaluation.params)), matrix.of(outcome)
                )


@pytest.mark.parametrize("name", FORMS)
def test_controls_are_matched_matrix_by_matrix(name, tokenizer, examples, generator) -> None:
    model, start = language_model(name, tokenizer)
    at = setting(model, examples, start, shaken(start, generator))
    cuts, evaluation, turned, before = both(surgery(k=[2, 8], operations=["remove", "keep"]), at)
    assert len(cuts) == 8
    for trial in cuts:
        other = at.start if trial.dose == "keep" else evaluation.params

        def energies(arm, other=other, evaluation=evaluation):
            edited = arm.edit.applied(evaluation.params)
            changes = {
                matrix: matrix.of(edited).double() - matrix.of(other).double() for matrix in cut(arm).matrices
            }
            sides = [residual_side(matrix, change, at.end) for matrix, change in changes.items()]
            return torch.stack([side.square().sum() for side in sides])

        wanted = energies(trial.treatment)
        assert_close(float(wanted.sum()), trial.treatment.sizes["removed energy"])
        for control in trial.controls:
            if control.kind == "random_energy":
                assert_close(energies(control), wanted, rtol=1e-4, atol=0)
            else:
                basis = cut(control).space(cut(control).matrices[0])
                assert_close(basis.T @ basis, torch.eye(trial.place["k"]).double())
    for trial in turned:
        for arm in trial.controls if trial.treatment.kind != "rest" else []:
            for matrix in transplant(arm).matrices:
                norms = [
                    torch.linalg.svdvals(
                        matrix.of(edit.applied(before.params)).double() - matrix.of(at.start)
                    )
                    for edit in (arm.edit, trial.treatment.edit)
                ]
                assert_close(norms[0], norms[1], rtol=0, atol=2e-6)  # of 0.1, in weights of 1 and fp32


def test_updates_near_the_rounding_of_the_weights_are_matched_as_well(
    model, params, examples, generator
) -> None:
    end = {
        key: weight + torch.randn(weight.shape, generator=generator) / 1e6 for key, weight in params.items()
    }
    cuts, _, turned, _ = both(surgery(k=1), setting(model, examples, params, end))
    assert len(cuts) == 4 and len(turned) == 11  # a Trial refuses controls that are not matched


def test_matrices_that_share_a_subspace_share_their_draws(model, params, examples, generator) -> None:
    at = setting(model, examples, params, shaken(params, generator))
    cuts, _, turned, _ = both(surgery(k=4), at)
    q, k, up = (matrix_of(model, name) for name in ("L0.q", "L0.k", "L0.up"))
    (control, other) = [arm for arm in cuts[0].controls if arm.kind == "random_k"]
    for draw in (cut(control).space, transplant(turned[0].controls[0]).rotation):
        assert draw is not None
        assert torch.equal(draw(q), draw(k)) and not torch.equal(draw(q), draw(up))
    assert not torch.equal(cut(control).space(q), cut(other).space(q))


def test_the_effects_of_surgery_are_those_of_a_model_edited_by_hand(
    model, params, examples, generator
) -> None:
    end = shaken(params, generator)
    copies = [{key: weight.clone() for key, weight in weights.items()} for weights in (params, end)]
    at = setting(model, examples, params, end)
    rows = surgery(groups=[["k", "up"]], layers=[1], k=4, transplants=[["o"]]).rows(at, lambda *_: None)
    table = tabulate(rows)
    by_hand, transplanted = dict(end), dict(params)
    for name in ("L1.k", "L1.up"):
        matrix = matrix_of(model, name)
        basis = inside_of(at, matrix, 4)
        delta = matrix.of(end).double() - matrix.of(params).double()
        value = matrix.of(params).double() + (delta - (delta @ basis) @ basis.T)
        by_hand = dict(matrix.replaced(by_hand, value))
    o = matrix_of(model, "L1.o")
    transplanted = dict(o.replaced(transplanted, o.of(end)))
    for arm, before, after in (
        ("top@remove", end, by_hand),
        ("delta@transplant", params, transplanted),
        ("weights@replace", params, end),
    ):
        changes = Evaluation(model, before, examples, SMALL).change(after)
        value_of = table[table.arm == arm].set_index("quantity").value
        assert value_of["kl_from_unedited"] == float(changes["kl_from_unedited"].double().mean())
        assert value_of["heldout_ce_change"] == float(changes["heldout_ce"].double().mean())
        assert value_of["preference_margin_change"] == float(changes["preference_margin"].double().mean())
    for weights, copy in zip((params, end), copies, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


def test_the_subspaces_are_those_of_the_end_where_the_start_is_random(
    model, params, examples, generator
) -> None:
    end = shaken(params, generator)
    at = setting(model, examples, params, end, from_random=True)
    (trial,), *_ = both(surgery(groups=[["k"]], k=4, operations=["keep"], transplants=[]), at)
    k = matrix_of(model, "L1.k")
    wanted = Subspace(inside_of(setting(model, examples, end, end), k, 4))
    assert_close(wanted.fraction(cut(trial.treatment).space(k).T), 1.0)


def test_scaling_is_between_removing_and_the_end(model, params, examples, generator) -> None:
    at = setting(model, examples, params, shaken(params, generator))
    asked = surgery(groups=[["k"]], k=4, operations=["remove", "scale"], factor=0.25, transplants=[])
    (removed, scaled), evaluation, *_ = both(asked, at)
    k = matrix_of(model, "L0.k")
    changes = [
        k.of(trial.treatment.edit.applied(evaluation.params)) - k.of(at.end) for trial in (removed, scaled)
    ]
    assert_close(changes[1], 0.75 * changes[0], rtol=0, atol=5e-7)


def test_the_rows_say_where_and_what_and_are_as_many_arms_as_announced(
    model, params, examples, generator
) -> None:
    at = setting(model, examples, params, shaken(params, generator))
    asked, done = surgery(), []
    asked.check(model.architecture)
    table = tabulate(asked.rows(at, lambda _, step: done.append(step)))
    assert done == [*range(1, asked.arms(model.architecture) + 1)]
    assert set(table.step) == {7}
    assert not table.duplicated(["matrix", "role", "subspace", "k", "arm", "quantity"]).any()
    arms = table[table.quantity == "kl_from_unedited"]
    assert {"random_k.1@remove", "random_energy.0@keep", "rotated.1@transplant"} <= set(arms.arm)
    places = arms.groupby("arm")[["matrix", "role", "subspace", "k"]]
    inputs = "attention_input+mlp_input"
    kept = [("", "read", inputs, k) for k in (1, 4, 16)] + [
        ("", "write", "prediction", k) for k in (1, 4, 16)
    ]
    assert places.get_group("top@keep").values.tolist() == [[*place] for place in kept]
    transplanted = places.get_group("delta@transplant")["matrix"].tolist()
    assert transplanted == ["", "", "", *kinds_of(model.architecture)]
    assert len(places.get_group("weights@replace")) == 1
    compared = set(table[table.quantity == "preference_margin_change_p_value"].arm)
    assert {"top@remove/random_energy", "delta@transplant/rotated"} <= compared


@pytest.mark.parametrize("name", FORMS)
def test_reads_writes_and_the_rest_are_all_of_the_update(name, tokenizer, examples, generator) -> None:
    model, start = language_model(name, tokenizer)
    at = setting(model, examples, start, shaken(start, generator))
    *_, turned, before = both(surgery(groups=[]), at)
    arms = [(trial.place, trial.treatment) for trial in turned if trial.place["matrix"] in ("", "rest")]
    parts = {(arm.kind, place["role"]): arm for place, arm in arms}
    edited = before.params
    for part in (("delta", "read"), ("delta", "write"), ("rest", "")):
        edited = parts[part].edit.applied(edited)
    assert all(torch.equal(edited[key], at.end[key]) for key in edited)
    rest = parts["rest", ""].edit.applied(before.params)
    kept = {matrix.parameter for matrix in model.architecture.matrices}
    assert kept == {key for key, weight in rest.items() if weight is before.params[key]}


def test_the_turned_rest_keeps_the_singular_values_of_embeddings_and_the_norm_of_gains(
    model, params, examples, generator
) -> None:
    at = setting(model, examples, params, shaken(params, generator))
    *_, turned, before = both(surgery(groups=[]), at)
    rest = turned[-1]
    assert rest.treatment.kind == "rest" and len(rest.controls) == 2
    exact = {key: weight.double() for key, weight in before.params.items()}
    changes = [
        {key: weight - exact[key] for key, weight in arm.edit.applied(exact).items()}
        for arm in (rest.treatment, *rest.controls)
    ]
    embed, gain = model.architecture.embed, model.architecture.final_norm.parameter
    for control in changes[1:]:
        assert_close(torch.linalg.svdvals(control[embed]), torch.linalg.svdvals(changes[0][embed]))
        assert_close(control[gain].norm(), changes[0][gain].norm())
        assert not torch.allclose(control[embed], changes[0][embed])
    assert not torch.allclose(changes[1][gain], changes[2][gain])


def test_the_parts_and_their_interaction_add_up_to_the_effect_of_all_weights(
    model, params, examples, generator
) -> None:
    at = setting(model, examples, params, shaken(params, generator))
    table = tabulate(surgery(groups=[]).rows(at, lambda *_: None))
    for quantity in ("preference_margin_change", "heldout_ce_change", "kl_from_unedited"):
        rows = table[(table["quantity"] == quantity) & table["draw"].isna()]
        value = rows.set_index(["treatment", "matrix", "role"])["value"]
        left = table[table["quantity"] == f"{quantity}_interaction"]
        assert left["arm"].tolist() == ["weights@replace"] and float(left["stderr"].iloc[0]) > 0
        parts = value["delta", "", "read"] + value["delta", "", "write"] + value["rest", "rest", ""]
        assert parts + left["value"].iloc[0] == pytest.approx(value["weights", "", ""], abs=1e-5)
        shown = by_treatment(table, quantity, ("rotated",)).set_index("treatment")["effect"]
        assert shown["interaction"] == f"{left['value'].iloc[0]:.3g}"
        assert shown["rest@replace"] == f"{value['rest', 'rest', '']:.3g}"


def test_a_rest_that_did_not_move_is_left_out_and_the_parts_add_up_all_the_same(
    model, params, examples, generator
) -> None:
    k, o = matrix_of(model, "L1.k"), matrix_of(model, "L1.o")
    end = dict(k.replaced(params, k.of(params) + torch.randn(32, 32, generator=generator) / 20))
    end = dict(o.replaced(end, o.of(end) + torch.randn(32, 32, generator=generator) / 20))
    table = tabulate(surgery(groups=[]).rows(setting(model, examples, params, end), lambda *_: None))
    assert "rest" not in set(table["treatment"])
    margin = table[(table["quantity"] == "preference_margin_change") & table["draw"].isna()]
    value = margin.set_index(["treatment", "matrix", "role"])["value"]
    left = table[table["quantity"] == "preference_margin_change_interaction"]["value"].iloc[0]
    whole = value["weights", "", ""] - value["delta", "", "read"] - value["delta", "", "write"]
    assert left == pytest.approx(whole, abs=1e-5)


def test_transplants_of_named_matrices_or_layers_have_no_rest(model, params, examples, generator) -> None:
    at = setting(model, examples, params, shaken(params, generator))
    for asked in ({"transplants": [["o"]]}, {"layers": [1]}):
        table = tabulate(surgery(groups=[], **asked).rows(at, lambda *_: None))
        assert "rest" not in set(table["treatment"])
        assert not table["quantity"].str.endswith("_interaction").any()


@pytest.mark.parametrize("name", FORMS)
def test_every_architecture_is_operated_on(name, tokenizer, examples, generator) -> None:
    model, start = language_model(name, tokenizer)
    asked = surgery(k=4, transplants=[["q"], ["down"]])
    asked.check(model.architecture)
    table = tabulate(
        asked.rows(setting(model, examples, start, shaken(start, generator), True), lambda *_: None)
    )
    arms = table[table.quantity == "kl_from_unedited"]
    assert len(arms) == asked.arms(model.architecture) and bool((arms.value > 0).all())


def test_groups_are_named_by_their_kinds_and_by_their_only_layer(model) -> None:
    architecture = model.architecture
    reads, writes = reads_and_writes(architecture)
    assert group_of(architecture, reads, None).place == {"matrix": "", "role": "read"}
    assert group_of(architecture, writes, [1]).place == {"layer": 1, "matrix": "", "role": "write"}
    assert group_of(architecture, ["k", "q"], None).place == {"matrix": "q+k", "role": "read"}
    assert group_of(architecture, ["k", "o"], None).place == {"matrix": "k+o", "role": ""}
    assert group_of(architecture, kinds_of(architecture), None).place == {"matrix": "", "role": ""}


def test_matrices_that_did_not_move_are_left_out_and_said(model, params, examples, caplog) -> None:
    end = moved(model, params, {"L0.k": torch.eye(32)})
    rows = surgery(k=4, transplants=[["o"]]).rows(setting(model, examples, params, end), lambda *_: None)
    assert {row["role"] for row in rows} == {"read"}
    assert "11 of 12 matrices did not move" in caplog.text


def test_surgery_refuses_an_update_that_is_none(model, params, examples) -> None:
    with pytest.raises(ValueError, match="none of the 12 matrices asked for moved between"):
        surgery().rows(setting(model, examples, params, params), lambda *_: None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": [2]}, "there is no layer 2: the model has layers 0 to 1"),
        ({"layers": []}, "layers is empty"),
        ({"groups": [["gate"]]}, "the model has no matrix gate; it has"),
        ({"transplants": [["gate"]]}, "the model has no matrix gate; it has"),
        ({"groups": [["k", "o"]]}, r"the group k\+o reads and writes, in different subspaces"),
        ({"groups": [["k"], ["k"]]}, "groups has the group .* twice"),
        ({"groups": [[]]}, "a group of groups names no matrix"),
        ({"k": 33}, "intervention.surgery.k must be 1 to 32"),
        ({"k": [0, 4]}, "intervention.surgery.k must be 1 to 32"),
        ({"k": []}, "intervention.surgery.k must be 1 to 32"),
        ({"level": 0.05}, "2 random controls give p-values of 0.333 at the least"),
        ({"controls": {"rotated": 2}}, "0 random controls"),
        ({"controls": {"random_k": 2}}, "0 random controls"),
    ],
)
def test_surgery_refuses_what_the_model_does_not_allow(model, asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        surgery(**asked).check(model.architecture)


def test_one_kind_of_random_subspace_is_enough(model) -> None:
    surgery(controls={"random_energy": 2}, transplants=[]).check(model.architecture)
    surgery(controls={"rotated": 2}, groups=[]).check(model.architecture)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"operations": []}, "operations is empty: name remove, keep or scale"),
        ({"operations": ["scale"]}, "the operation scale needs a factor"),
        ({"operations": ["scale"], "factor": float("inf")}, "factor must be finite"),
        ({"operations": ["scale"], "factor": 1.0}, "the 1 that changes nothing"),
        ({"controls": {"random_k": -1}}, "controls.random_k must be 0 or more, got -1"),
        ({"groups": [], "transplants": []}, "both empty: nothing is left to do"),
    ],
)
def test_surgery_refuses_what_means_nothing(asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        surgery(**asked)
