# pandas types the results of indexing as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import pandas as pd
import pytest

from weightgeom.analysis.chain import BETWEEN, STAGES
from weightgeom.analysis.referee import (
    EXPLAINED,
    MEMBERS,
    UNTESTABLE,
    Claim,
    Finding,
    Update,
    counted,
    judged,
    updates,
    verdicts,
)
from weightgeom.claims.low_magnitude import LowMagnitude
from weightgeom.claims.small_weights import SmallWeights
from weightgeom.table import row, tabulate


def overlaps(ours, null, sd=0.01, step=1, matrices=("q", "down"), layers=(0, 1)):
    """Rows of the probe sparsity, the same for every matrix."""
    values = {
        "low_overlap": ours,
        "null_low_overlap_mean": null,
        "null_low_overlap_sd": sd,
        "invisible_share": 0.7,
    }
    return [
        {"step": step, **row(name, value, n=64, layer=layer, matrix=matrix, role="read")}
        for name, value in values.items()
        for layer in layers
        for matrix in matrices
    ]


def update(rows, trained_by="dpo", kind="contrast", **params):
    return Update("the update", {"sparsity": tabulate(rows)}, 1, trained_by, kind, params)


@pytest.mark.parametrize(
    ("ours", "null", "verdict"),
    [
        (0.7, 0.65, EXPLAINED),  # the null covers 0.35 of 0.4
        (0.7, 0.72, EXPLAINED),  # and more than all
        (0.7, 0.45, "supported"),  # 0.15 of 0.4
        (0.25, 0.2, "contradicted"),  # not above the level at all
    ],
)
def test_a_claim_about_a_level_is_judged_by_the_part_that_the_null_covers(ours, null, verdict):
    assert judged(ours, null, 0.01, "above", 0.3) == verdict
    assert judged(1 - ours, 1 - null, 0.01, "below", 0.7) == verdict  # the mirror image


def test_a_share_at_the_end_of_its_range_is_not_explained_by_a_null_near_it():
    assert judged(1.0, 0.85, 0.01, "above", 0.3) == EXPLAINED  # 0.55 of 0.7
    assert judged(1.0, 0.85, 0.01, "above", 0.3, end=1.0) == "supported"
    assert judged(0.9, 0.85, 0.01, "above", 0.3, end=1.0) == EXPLAINED  # a third of the way
    assert judged(0.0, 0.1, 0.01, "below", 0.3, end=0.0) == "supported"


def test_what_lies_within_two_standard_deviations_of_the_null_is_explained_by_it():
    assert judged(0.7, 0.45, 0.13, "above", 0.3) == EXPLAINED
    assert judged(0.7, 0.45, 0.12, "above", 0.3) == "supported"


def test_without_a_level_the_null_is_the_level_within_a_factor():
    assert judged(5.0, 8.0, 0.1, "below") == "supported"
    assert judged(7.0, 8.0, 0.1, "below") == EXPLAINED  # 8 / 7 < 1.25
    assert judged(11.0, 8.0, 0.1, "below") == "contradicted"
    assert judged(11.0, 8.0, 2.0, "below") == EXPLAINED


def test_the_mean_is_over_matrices_and_its_null_narrows_with_their_number():
    finding = update(overlaps(0.7, 0.45, sd=0.1)).beyond("sparsity", "low_overlap", "above", 0.3)
    assert finding.n == 4 and finding.ours == pytest.approx(0.7)
    assert finding.null_sd == pytest.approx(0.05)  # √(4 · 0.1²) / 4
    assert "the null covers 38% of the distance to 0.3" in finding.detail  # 0.15 / 0.4


def test_the_joint_null_of_a_mean_counts_where_it_is_wider():
    rows = overlaps(0.7, 0.45, sd=0.1)
    wider = row("low_overlap_mean_null_sd", 0.2, n=9, matrix="down")
    finding = update([*rows, {"step": 1, **wider}]).beyond(
        "sparsity", "low_overlap", "above", 0.3, of=("down", "q")
    )
    assert finding.null_sd == pytest.approx(0.2) and finding.verdict == EXPLAINED


def test_values_are_those_of_the_last_step_at_the_smallest_dimension_and_at_no_random_subspace():
    place = {"layer": 0, "matrix": "q"}
    rows = [
        {"step": 0, **row("ratio", 9.0, n=1, **place, subspace="attention_input", k=4)},
        {"step": 1, **row("ratio", 2.0, n=1, **place, subspace="attention_input", k=8)},
        {"step": 1, **row("ratio", 3.0, n=1, **place, subspace="attention_input", k=4)},
        {"step": 1, **row("ratio", 1.0, n=1, **place, subspace="random", k=4)},
        {"step": 1, **row("ratio", 5.0, n=1, layer=0, matrix="k", subspace="attention_input", k=2)},
    ]
    assert list(update([]).tables) == ["sparsity"]
    values = Update("it", {"rsf": tabulate(rows)}, 1).values("rsf", "ratio")
    assert values.droplevel("expert").to_dict() == {(0, "k"): 5.0, (0, "q"): 3.0}


def test_missing_rows_are_not_testable_and_name_the_override():
    lines = verdicts([SmallWeights()], [Update("the update", {}, 1)])
    assert list(lines["verdict"]) == [UNTESTABLE]
    assert "add it, as in 'probe=[rsf,sparsity,rotation]'" in lines["detail"][0]
    partly = [entry for entry in overlaps(0.7, 0.4) if entry["quantity"] != "null_low_overlap_sd"]
    (detail,) = verdicts([SmallWeights()], [update(partly)])["detail"]
    assert detail == "the probe sparsity has no rows null_low_overlap_sd of this update"


def test_a_finding_without_its_number_or_null_is_no_verdict():
    class Unknown(SmallWeights):
        def judged(self, update):
            return Finding("supported", "low_overlap", 0.7, float("nan"), detail="0.7 against nan")

    (line,) = verdicts([Unknown()], [update(overlaps(0.7, 0.4))]).itertuples()
    assert (line.verdict, line.detail) == (UNTESTABLE, "not all numbers are known: 0.7 against nan")


def test_an_update_of_another_kind_has_its_numbers_and_no_verdict():
    rows = overlaps(0.7, 0.4)
    claim = LowMagnitude()
    (by_dpo,) = verdicts([claim], [update(rows)]).itertuples()
    assert by_dpo.verdict == "supported"
    (by_sft,) = verdicts([claim], [update(rows, "sft", "likelihood")]).itertuples()
    assert by_sft.verdict == UNTESTABLE and by_sft.ours == pytest.approx(0.7)
    assert "about training by preferences or rewards, and this update is of sft" in by_sft.detail
    (unknown,) = verdicts([claim], [update(rows, "", "")]).itertuples()
    assert "run it with model.stage=dpo" in unknown.detail
    assert list(verdicts([SmallWeights()], [update(rows, "", "")])["verdict"]) == ["supported"]


def test_the_update_of_a_training_or_a_pair_is_that_of_its_last_step():
    table = tabulate([*overlaps(0.4, 0.4, step=0), *overlaps(0.7, 0.4, step=8)])
    tables = {"sparsity": table, "sparsity_pretraining": table.assign(step=99)}
    (trained,) = updates(tables, {"objective": "dpo"}, "contrast")
    assert (trained.step, trained.trained_by, trained.kind) == (8, "dpo", "contrast")
    assert list(trained.tables) == ["sparsity"]
    (pair,) = updates(tables, {"objective": "none", "model.stage": "grpo"})
    assert (pair.trained_by, pair.kind) == ("grpo", "contrast")
    (unknown,) = updates(tables, {"objective": "none", "model.stage": None})
    assert (unknown.trained_by, unknown.kind) == ("", "")


def test_a_chain_has_an_update_for_every_stage_behind_the_first():
    table = tabulate([*overlaps(0.4, 0.4, step=1), *overlaps(0.7, 0.4, step=2)])
    table.attrs[STAGES] = ["base", "sft", "rlvr1"]
    tables = {"sparsity": table.assign(step=0), f"sparsity{BETWEEN}": table, STAGES: pd.DataFrame()}
    sft, rlvr = updates(tables, {"objective": "none"})
    assert (sft.name, sft.kind) == ("sft after base", "likelihood")
    assert (rlvr.name, rlvr.kind) == ("rlvr1 after sft", "contrast")
    lines = verdicts([LowMagnitude()], [sft, rlvr])
    assert list(lines["verdict"]) == [UNTESTABLE, "supported"]
    assert counted(lines) == "1 supported, 1 not testable here"


def test_a_claim_has_all_members_of_the_contract():
    assert isinstance(SmallWeights(), Claim)
    assert all(name in dir(Claim) or name in Claim.__annotations__ for name in MEMBERS)
    assert Finding(UNTESTABLE).n == 0
