# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import numpy as np
import pandas as pd
import pytest

from weightgeom.origins.validation import ALL, form_of, held_out, interval, objective_of, rates

LABELS = ("ce", "dpo", "ce+lora", "noise")


def known(turn: int, seed: int = 0) -> pd.DataFrame:
    """Updates whose measurement is a code of the origin, which each base turns by `turn` more."""
    generator = np.random.default_rng(seed)
    return pd.DataFrame([
        {"label": label, "base": base, "data": data, "rate": rate, "step": step,
         "x": 30.0 * ((code + turn * number) % 4) + generator.standard_normal()}
        for code, label in enumerate(LABELS) for number, base in enumerate("ABC")
        for data in "st" for rate in "lmh" for step in (8, 24)
    ])  # fmt: skip


@pytest.mark.parametrize("axis", ["base", "data", "rate", "step", ALL])
def test_an_origin_that_every_setting_shows_alike_is_never_missed(axis: str) -> None:
    summary = rates(held_out(known(0), ["x"], axis))
    assert summary["error"] == summary["objective_error"] == summary["form_error"] == summary["worst"] == 0
    assert summary["n"] == 4 * 3 * 2 * 3 * 2 and summary["answered"] > 0.85 and summary["covered"] > 0.85


def test_codes_that_every_base_has_of_its_own_help_no_base_that_was_held_out() -> None:
    # No origin has its code of one base in another; in a base that was seen, data say nothing new.
    table = known(turn=1)
    assert rates(held_out(table, ["x"], "base"))["error"] > 0.6
    judged = rates(held_out(table[table["base"] == "A"], ["x"], "data"))
    assert judged["error"] == 0


@pytest.mark.parametrize(("axis", "many"), [("base", "C"), ("data", "t"), (ALL, "C")])
def test_an_update_is_never_judged_by_its_own_setting(axis: str, many: str) -> None:
    # Of the one setting there are twenty times as many, with codes in reverse: by itself it would be known.
    table = known(turn=0)
    own = table["data" if axis == "data" else "base"] == many
    reverse = table[own].assign(x=90.0 - table["x"][own])
    table = pd.concat([table[~own], *[reverse] * 20], ignore_index=True)
    judged = held_out(table, ["x"], axis)
    part = judged[judged["data" if axis == "data" else "base"] == many]
    assert (part["best"] != part["label"]).all()


def test_rates_count_objectives_forms_and_answers_apart() -> None:
    judged = pd.DataFrame({
        "label": ["ce", "dpo", "ce+lora", "noise", "ce"],
        "best": ["ce", "ce", "ce", "noise", "dpo"],
        "answer": ["ce", "", "ce", "noise", ""],
        "covered": [True, True, False, True, True],
        "outside": [False, True, False, False, False],
        "fold": ["A", "A", "A", "B", "B"],
    })  # fmt: skip
    summary = rates(judged)
    assert (
        summary["error"] == 3 / 5 and summary["objective_error"] == 2 / 4 and summary["form_error"] == 1 / 5
    )
    assert summary["whole_error"] == 2 / 3 and summary["adapter_error"] == 0
    assert summary["answered"] == 3 / 5 and summary["answered_error"] == 1 / 3
    assert summary["whole_answered"] == 1 / 3 and summary["whole_answered_error"] == 0
    assert (
        summary["adapter_answered"] == summary["adapter_answered_error"] == 1
        and summary["adapter_covered"] == 0
    )
    assert summary["random_answered"] == summary["random_covered"] == 1
    assert summary["covered"] == 4 / 5 and summary["outside"] == 1 / 5
    assert summary["worst"] == 2 / 3 and summary["worst_covered"] == 2 / 3


def test_the_interval_is_clopper_and_pearsons() -> None:
    assert interval(0, 20) == pytest.approx((0, 1 - 0.025 ** (1 / 20)))
    assert interval(20, 20) == pytest.approx((0.025 ** (1 / 20), 1))
    assert interval(0, 0) == (0, 1)


def test_the_parts_of_an_origin() -> None:
    assert [objective_of(name) for name in ("dpo", "dpo+lora")] == ["dpo", "dpo"]
    names = ("rl", "rl+lora", "noise", "rotated", "rotated+lora")
    assert [form_of(name) for name in names] == ["whole", "lora", "random", "random", "random"]


def test_an_axis_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="rate has a single value"):
        held_out(known(0).assign(rate="l"), ["x"], "rate")
