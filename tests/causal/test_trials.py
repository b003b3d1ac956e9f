from math import sqrt
from typing import Any

import pytest
import torch
from moving import matrix_of
from scipy.stats import false_discovery_control
from torch.testing import assert_close

from weightgeom.causal.directions import haar
from weightgeom.causal.edits import RankOne
from weightgeom.causal.effects import UNITS, Effects, Evaluation
from weightgeom.causal.trials import Arm, Trial, check_controls, measured, named, with_q_values
from weightgeom.table import arm_columns, row, tabulate

PLACE = {"layer": 0, "matrix": "k", "role": "read", "subspace": "attention_input", "k": 4}


@pytest.fixture
def evaluation(model, params, examples):
    return Evaluation(model, params, examples, Effects(tokens=60, length=12, pairs=4, questions=5))


@pytest.fixture
def arm(model):
    def made(kind, draw=0, size=1.0, predicted=None, matched="frobenius norm"):
        edit = RankOne(matrix_of(model, "L0.k"), size, haar(32, "u"), haar(32, f"{kind} {draw}"))
        return Arm(kind, edit, {matched: size}, matched, draw, predicted or {})

    return made


def planted(evaluation, monkeypatch, *samples):
    """Let the evaluation find these samples of one effect, arm by arm."""
    waiting = iter(samples)
    monkeypatch.setattr(evaluation, "change", lambda edited: {"heldout_ce": next(waiting)})


def values(rows):
    return {(row["arm"], row["quantity"]): row["value"] for row in rows}


def log_metrics(metrics, done):
    pass


def test_every_arm_and_every_comparison_has_its_rows(evaluation, arm):
    trial = Trial(PLACE, "0.1", arm("activation"), [arm("random", 0), arm("random", 1), arm("bottom")])
    steps = []
    rows = list(measured([trial, trial], evaluation, 0, lambda metrics, done: steps.append(done), done=3))
    assert steps == list(range(4, 12))
    assert {row["arm"] for row in rows} == {
        *("activation@0.1", "random.0@0.1", "random.1@0.1", "bottom.0@0.1"),
        "activation@0.1/random",  # one control of the kind bottom gives no comparison
    }
    table: Any = tabulate([{"step": 0, **row} for row in rows])
    assert (table["matrix"] == "k").all() and (table["layer"] == 0).all() and (table["k"] == 4).all()
    effects = {named(name) for name in UNITS}
    assert {row["quantity"] for row in rows if "/" not in row["arm"]} == effects
    compared = {row["quantity"] for row in rows if "/" in row["arm"]}
    assert {f"{name}_p_value" for name in effects} <= compared
    assert all(row["unit"] == "1" and row["n"] == 2 for row in rows if "/" in row["arm"])


def test_an_arms_row_is_the_mean_over_prompts_with_its_standard_error(evaluation, arm, monkeypatch):
    planted(
        evaluation,
        monkeypatch,
        *(torch.tensor(effects) for effects in ([1.0, 2.0, 6.0], [0.0] * 3, [1.0] * 3)),
    )
    predicted = {"heldout_ce": 2.5}
    treatment = arm("activation", predicted=predicted)
    trial = Trial(PLACE, "0.1", treatment, [arm("random", 0), arm("random", 1)])
    first, forecast, *_ = measured([trial], evaluation, 0, log_metrics)
    # Mean 3, deviations -2, -1, 3: variance 14/2 = 7, standard error √(7/3)
    place = {"n": 3, "unit": "nats/token", **arm_columns("activation", "0.1"), **PLACE}
    expected = row("heldout_ce_change", 3.0, stderr=first["stderr"], **place)
    assert first == expected and first["stderr"] == pytest.approx(sqrt(7 / 3))
    assert forecast == row("predicted_heldout_ce_change", 2.5, **place)


def test_the_effect_size_and_the_p_value_by_hand(evaluation, arm, monkeypatch):
    # Means -4 of the treatment; 1, -2, 6 of the controls, which count by their size.
    samples = ([-3.0, -5.0], [1.0, 1.0], [-1.0, -3.0], [5.0, 7.0])
    planted(evaluation, monkeypatch, *map(torch.tensor, samples))
    trial = Trial(PLACE, "0.1", arm("activation"), [arm("random", draw) for draw in range(3)])
    value_of = values(measured([trial], evaluation, 0, log_metrics))
    # One of three is as large: (1 + 1)/(1 + 3)
    assert value_of["activation@0.1/random", "heldout_ce_change_p_value"] == 0.5
    # (4 - 3)/sd, the controls' mean being (1 + 2 + 6)/3 = 3 and their variance (4 + 1 + 9)/2 = 7
    assert_close(value_of["activation@0.1/random", "heldout_ce_change_effect_size"], 1 / sqrt(7))


def test_kinds_of_controls_are_compared_apart(evaluation, arm, monkeypatch):
    means = (2.0, 1.0, 3.0, 0.0, 1.0)
    planted(evaluation, monkeypatch, *(torch.full((3,), mean) for mean in means))
    kinds = ("random", "random", "within", "within")
    controls = [arm(kind, number % 2) for number, kind in enumerate(kinds)]
    value_of = values(measured([Trial(PLACE, "1", arm("delta"), controls)], evaluation, 0, log_metrics))
    # Of random 1 and 3 one is as large: 2/3; of within 0 and 1 none: 1/3
    assert_close(value_of["delta@1/random", "heldout_ce_change_p_value"], 2 / 3)
    assert_close(value_of["delta@1/within", "heldout_ce_change_p_value"], 1 / 3)
    # All prompts alike: the interval is the value, (2 - 2)/√2 and (2 - 1/2)/√(1/2)
    for kind, size in (("random", 0.0), ("within", 1.5 * sqrt(2))):
        for end in ("", "_low", "_high"):
            value = value_of[f"delta@1/{kind}", f"heldout_ce_change_effect_size{end}"]
            assert_close(value, size, rtol=1e-6, atol=1e-6)


def test_controls_that_do_nothing_leave_a_p_value_and_no_effect_size(evaluation, arm, monkeypatch):
    planted(evaluation, monkeypatch, torch.ones(3), *[torch.zeros(3)] * 4)
    trial = Trial(PLACE, "1", arm("delta"), [arm("random", draw) for draw in range(4)])
    value_of = values(measured([trial], evaluation, 0, log_metrics))
    compared = {quantity: value for (name, quantity), value in value_of.items() if "/" in name}
    assert compared == {"heldout_ce_change_p_value": 0.2}  # (1 + 0)/(1 + 4)


def test_one_prompt_has_no_standard_error_and_no_interval(evaluation, arm, monkeypatch):
    planted(evaluation, monkeypatch, *(torch.tensor([effect]) for effect in (3.0, 1.0, 2.0)))
    trial = Trial(PLACE, "1", arm("delta"), [arm("random", 0), arm("random", 1)])
    rows = list(measured([trial], evaluation, 0, log_metrics))
    assert all(row["stderr"] is None for row in rows)
    assert not [row for row in rows if row["quantity"].endswith(("_low", "_high"))]


@pytest.mark.slow
def test_the_interval_covers_the_effect_size_over_all_prompts(evaluation, arm, monkeypatch, generator):
    controls, prompts, repetitions = 9, 60, 200
    truth = torch.tensor([2.0, *(0.2 * draw for draw in range(1, controls + 1))], dtype=torch.float64)
    size = float((truth[0] - truth[1:].mean()) / truth[1:].std())
    trial = Trial(PLACE, "1", arm("delta"), [arm("random", draw) for draw in range(controls)])
    covered = 0
    for seed in range(repetitions):
        common = torch.randn(
            prompts, generator=generator, dtype=torch.float64
        )  # the arms share their prompts
        noise = torch.randn(controls + 1, prompts, generator=generator, dtype=torch.float64)
        planted(evaluation, monkeypatch, *(truth[:, None] + 0.5 * common + 0.3 * noise))
        value_of = values(measured([trial], evaluation, seed, log_metrics))
        name = "heldout_ce_change_effect_size"
        low, high = (value_of["delta@1/random", f"{name}_{end}"] for end in ("low", "high"))
        covered += low <= size <= high
    # 95 %, less the percentile method's error with 60 prompts and 200 resamples, within five standard
    # deviations of the binomial, √(0.95 · 0.05 / 200) = 1.5 %; and not much more than asked for.
    assert 0.87 < covered / repetitions < 1


def test_q_values_are_those_of_scipy_over_layers_and_matrices_of_one_dose_effect_and_kind_of_control():
    def p_row(
        value,
        matrix="k",
        layer=0,
        arm=("activation", "0.1", "random"),
        quantity="kl_from_unedited_p_value",
        k=4,
    ):
        treatment, dose, against = arm
        place = {"matrix": matrix, "layer": layer, "k": k, **arm_columns(treatment, dose, against=against)}
        return row(quantity, value, n=39, **place)

    families = [
        # Another direction is no other family: the matrix that writes has one of its own.
        [
            p_row(0.01),
            p_row(0.04, layer=1),
            p_row(0.03, "o", arm=("prediction", "0.1", "random")),
            p_row(0.5, "o", 1),
        ],
        [
            p_row(0.02, arm=("activation", "0.3", "random")),
            p_row(0.03, "o", arm=("activation", "0.3", "random")),
        ],
        [p_row(0.04, arm=("activation", "0.1", "within"))],
        [p_row(0.05, quantity="heldout_ce_change_p_value")],
        [p_row(0.05, k=8)],
    ]
    other = p_row(3.0, quantity="kl_from_unedited_effect_size")
    given = [member for family in families for member in family] + [other]
    rows = with_q_values(given)
    assert rows[: len(given)] == given  # as they were, and q-values behind them
    behind = rows[len(given) :]
    expected = [
        {
            **member,
            "quantity": member["quantity"].replace("_p_value", "_q_value"),
            "value": pytest.approx(float(q)),
        }
        for family in families
        for member, q in zip(family, false_discovery_control([each["value"] for each in family]), strict=True)
    ]
    assert behind == expected
    # By hand, of the first family: 4·0.01/1, 4·0.03/2 and 4·0.04/3, least from behind; 0.5 alone
    assert [each["value"] for each in behind[:4]] == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_without_comparisons_there_are_no_q_values():
    rows = [row("kl_from_unedited", 0.1, n=4, **arm_columns("activation", "0.1"))]
    assert with_q_values(rows) == rows


def test_a_treatment_without_controls_is_no_trial(arm):
    with pytest.raises(ValueError, match=r"activation@0\.1 has no controls: an effect needs some"):
        Trial(PLACE, "0.1", arm("activation"), [])


@pytest.mark.parametrize(
    ("matched", "tolerance"),
    [("frobenius norm", 1e-6), ("output energy", 1e-4), ("removed energy", 1e-4), ("dimension", 0.0)],
)
def test_a_control_that_is_not_matched_is_no_control(arm, matched, tolerance):
    treatment = arm("activation", size=2.0, matched=matched)
    for sign in (-1, 1):
        near, far = (2 * (1 + sign * tolerance * factor) for factor in (0.9, 1.1))
        Trial(PLACE, "0.1", treatment, [arm("random", size=near, matched=matched)])
        if matched == "dimension":
            far = 2.0 + sign
        controls = [arm("random", 0, 2.0, matched=matched), arm("random", 7, far, matched=matched)]
        message = rf"random\.7@0\.1 at .*'layer': 0.* has a {matched} of .* a control must have the same"
        with pytest.raises(ValueError, match=message):
            Trial(PLACE, "0.1", treatment, controls)


def test_a_control_of_no_definite_size_is_no_control(arm):
    with pytest.raises(ValueError, match="a control must have the same"):
        Trial(PLACE, "0.1", arm("activation"), [arm("random", size=float("nan"))])


@pytest.mark.parametrize(("level", "needed"), [(0.05, 19), (0.01, 99), (0.5, 1), (0.03, 33), (0.001, 999)])
def test_a_level_needs_as_many_controls_as_can_reach_it(level, needed):
    check_controls(needed, level)
    assert 1 / (1 + needed) <= level * (1 + 1e-9) < 1 / needed * (1 + 1e-9)
    message = (
        rf"{needed - 1} random controls give p-values of {1 / needed:.3g} at the least, and level is"
        rf" {level:g}: ask for {needed} or more"
    )
    with pytest.raises(ValueError, match=message):
        check_controls(needed - 1, level)


def test_where_less_is_expected_the_controls_that_change_no_more_count(evaluation, arm, monkeypatch):
    # Of the controls' 0.5, 2 and -3 only the first changes no more than 1: p = (1 + 1) / (1 + 3).
    planted(evaluation, monkeypatch, *(torch.full((2,), mean) for mean in (1.0, 0.5, 2.0, -3.0)))
    controls = [arm("random", draw) for draw in range(3)]
    trial = Trial(PLACE, "keep", arm("top"), controls, "less")
    value_of = values(measured([trial], evaluation, 0, log_metrics))
    assert value_of["top@keep/random", "heldout_ce_change_p_value"] == 0.5
