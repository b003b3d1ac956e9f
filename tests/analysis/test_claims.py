# pyright: reportAttributeAccessIssue=false
from pathlib import Path

import pandas as pd
import pytest
import study
from study import Planted, rank1, rsf

from weightgeom.analysis.claims import AGREES, DISAGREES, UNTESTED, verdicts
from weightgeom.analysis.over_seeds import condense
from weightgeom.analysis.settings import settings
from weightgeom.table import COLUMNS

KEYS = ("objective", "variant", "seed", "model", "model_seed", "data", "data_seed", "preference")


def frames(runs: list[Planted]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows and runs that `report.read` finds of a study, without a store."""
    params = [{key: str(value) for key, value in run.all_params.items()} for run in runs]
    described, rows = [], []
    tags = [dict(run.tags) for run in runs]
    for number, (run, setting) in enumerate(zip(runs, settings(params, tags), strict=True)):
        about = {"run_id": str(number), "participation_ratio": run.sharpness, "target_energy": 0.5, **setting}
        described.append(about)
        for name, table in run.tables.items():
            place = {key: setting[key] for key in KEYS} | {"run_id": str(number)}
            before = name.endswith("_pretraining") or (run.objective == "none" and not setting["pair"])
            told = {"trajectory": "pretraining" if before else "training"}
            rows.append(table.assign(**place, **told, table=name.removesuffix("_pretraining")))
    return pd.concat(rows, ignore_index=True), pd.DataFrame(described)


def judged(runs: list[Planted]) -> pd.DataFrame:
    rows, about = frames(runs)
    assert set(COLUMNS) <= set(rows.columns)
    return verdicts(condense(rows, about), about)


def said(found: pd.DataFrame, claim: int) -> dict[tuple[str, str], str]:
    """Verdicts of a claim by setting and side."""
    part = found[found["claim"] == claim]
    return dict(zip(zip(part["setting"], part["side"], strict=True), part["verdict"], strict=True))


@pytest.fixture(scope="module")
def agreeing() -> pd.DataFrame:
    return judged(study.agreeing())


@pytest.fixture(scope="module")
def contrary() -> pd.DataFrame:
    return judged(study.contrary())


@pytest.mark.slow
@pytest.mark.parametrize("claim", range(1, 8))
def test_a_study_with_a_claim_planted_in_it_agrees_with_it(agreeing, claim):
    assert set(said(agreeing, claim).values()) == {AGREES}


@pytest.mark.slow
@pytest.mark.parametrize("claim", range(1, 8))
def test_a_study_with_the_opposite_planted_in_it_disagrees(contrary, claim):
    assert set(said(contrary, claim).values()) == {DISAGREES}


def test_what_no_run_measured_is_said_to_be_not_tested_and_how_to_test_it():
    found = judged([Planted("dpo", {"rsf": rsf(5.0, 1.0)})])
    verdict = found.set_index("claim")
    assert [verdict.loc[claim, "verdict"] for claim in (1, 2)] == [AGREES, AGREES]
    for claim in range(3, 8):
        assert verdict.loc[claim, "verdict"] == UNTESTED
        assert "no run measured it: weightgeom run" in verdict.loc[claim, "finding"]
        assert verdict.loc[claim, "n"] == 0 and pd.isna(verdict.loc[claim, "value"])


def test_alignment_is_judged_by_objective_and_preference():
    runs = [Planted("dpo", {"rsf": rsf(5.0, 1.0)}), Planted("ce", {"rsf": rsf(5.0, 3.0)})]
    facts = {"data.preference": "facts"}
    runs.append(Planted("dpo", {"rsf": rsf(5.0, 4.5)}, params=facts))
    runs.append(Planted("ce", {"rsf": rsf(5.0, 4.0)}, params=facts))
    found = judged(runs)
    assert said(found, 2) == {("dpo · style", "write"): AGREES, ("dpo · facts", "write"): DISAGREES}
    assert said(found, 3) == {
        ("dpo · style against ce · style", "write"): AGREES,
        ("dpo · facts against ce · facts", "write"): DISAGREES,
    }


def test_the_read_ratio_is_judged_by_q_and_k_each():
    table = rsf(5.0, 1.0)
    k = (table["matrix"] == "k") & (table["quantity"] == "ratio")
    table.loc[k, "value"] = 1.1  # the null of a mean over two layers: 1 ± 2 · 0.1 / √2 = 1 ± 0.14
    assert said(judged([Planted("dpo", {"rsf": table})]), 1) == {("dpo · style", "read"): DISAGREES}


def test_the_number_is_the_mean_over_seeds_with_students_interval():
    runs = [Planted("dpo", {"rsf": rsf(5.0, write)}, seed=n) for n, write in enumerate((1.0, 1.2, 1.4))]
    line = judged(runs).query("claim == 2").iloc[0]
    # mean 1.2, sd 0.2, t(2; 0.975) = 4.3027: 4.3027 · 0.2 / √3 = 0.4968
    assert line["value"] == pytest.approx(1.2) and line["n"] == 3
    assert line["low"] == pytest.approx(1.2 - 0.4968, abs=1e-4)
    assert line["high"] == pytest.approx(1.2 + 0.4968, abs=1e-4)
    assert "write ratio 1.20 [0.70, 1.70]" in line["finding"]


def test_a_write_ratio_above_its_null_but_below_half_of_pretrainings_agrees():
    tables = {"rsf": rsf(5.0, 1.4), "rsf_pretraining": rsf(5.0, 3.0)}
    assert said(judged([Planted("dpo", tables)]), 2) == {("dpo · style", "write"): AGREES}
    alone = {"rsf": rsf(5.0, 1.4)}
    assert said(judged([Planted("dpo", alone)]), 2) == {("dpo · style", "write"): DISAGREES}


def test_pretraining_is_compared_with_the_alignment_of_its_own_base():
    runs = [
        Planted("dpo", {"rsf": rsf(5.0, 2.0), "rsf_pretraining": rsf(5.0, 2.5)}, base=0),
        Planted("dpo", {"rsf": rsf(5.0, 4.0), "rsf_pretraining": rsf(5.0, 4.5)}, base=1),
    ]
    line = judged(runs).query("claim == 3").iloc[0]
    assert line["verdict"] == AGREES and line["value"] == pytest.approx(0.5) and line["n"] == 2
    assert "positive in 2 of 2 runs" in line["finding"]


def test_a_newer_run_of_the_same_setting_and_seeds_stands_for_the_older():
    runs = [Planted("dpo", {"rsf": rsf(5.0, write)}) for write in (3.0, 1.0)]
    line = judged(runs).query("claim == 2").iloc[0]
    assert line["n"] == 1 and line["value"] == pytest.approx(1.0)


def test_runs_that_differ_in_more_than_seeds_are_not_pooled():
    runs = [Planted("dpo", {"rsf": rsf(5.0, 1.0)}, params={"training.steps": steps}) for steps in (64, 128)]
    runs.append(Planted("dpo", {"rsf": rsf(5.0, 1.0)}, params={"objective.beta": 0.5}))
    assert list(said(judged(runs), 2)) == [
        ("dpo beta=0.1 · style · training.steps=128", "write"),
        ("dpo beta=0.1 · style · training.steps=64", "write"),
        ("dpo beta=0.5 · style · training.steps=64", "write"),
    ]


def test_what_changes_no_number_does_not_tell_settings_apart():
    runs = [
        Planted("dpo", {"rsf": rsf(5.0, 1.0)}, seed=n, params={"probe.rsf.increments": n == 1})
        for n in (0, 1)
    ]
    assert judged(runs).query("claim == 2")["n"].tolist() == [2]


def test_a_pair_of_checkpoints_is_an_alignment_by_its_own_name():
    pair = {
        "model._target_": "weightgeom.bases.pretrained.TwoCheckpoints",
        **{"model.before": "org/base", "model.after": "org/instruct", "model": "pair"},
    }
    found = judged([Planted("none", {"rsf": rsf(5.0, 1.0, steps=(1,))}, params=pair)])
    assert said(found, 1) == {("org/base → org/instruct · style", "read"): AGREES}


def test_models_and_texts_without_seeds_are_settings_too():
    pair = {
        "model._target_": "weightgeom.bases.pretrained.TwoCheckpoints",
        **{"model.before": "a", "model.after": "b", "model": "pair", "model.seed": "", "data.seed": ""},
        **{"data.preference": "", "data": "text"},
    }
    found = judged([Planted("none", {"rsf": rsf(5.0, 1.0, steps=(1,))}, params=pair)])
    assert said(found, 1) == {("a → b", "read"): AGREES}


def test_too_few_objectives_or_runs_are_not_ranked():
    runs = [
        Planted(objective, {"rsf": rsf(5.0, 1.0 + n)}, sharpness=1.0 + n)
        for n, objective in enumerate(("graded/dpo", "graded/ce"))
    ]
    line = judged(runs).query("claim == 4").iloc[0]
    assert line["verdict"] == UNTESTED
    assert line["finding"] == "2 objectives in 2 runs are too few to rank"


def test_a_rank_correlation_within_chance_does_not_agree():
    sharp = (("graded/dpo", 1.0, 2.0), ("graded/ce", 1.5, 1.0), ("graded/token_tau01", 2.0, 2.2))
    runs = [
        Planted(objective, {"rsf": rsf(5.0, write + 0.01 * seed)}, sharpness=sharpness, seed=seed)
        for objective, sharpness, write in sharp
        for seed in (0, 1)
    ]
    line = judged(runs).query("claim == 4").iloc[0]
    assert line["value"] > 0 and line["verdict"] == DISAGREES
    assert "over 6 runs of 3 objectives" in line["finding"]


def test_a_training_on_the_corpus_is_no_point_of_the_graded_control():
    sharp = (("graded/dpo", 1.0, 1.0), ("graded/ce", 1.5, 2.0), ("graded/token_tau01", 2.0, 3.0))
    runs = [
        Planted(objective, {"rsf": rsf(5.0, write)}, sharpness=sharpness, seed=seed)
        for objective, sharpness, write in (*sharp, ("ce", 9.0, 0.5))
        for seed in (0, 1)
    ]
    line = judged(runs).query("claim == 4").iloc[0]
    assert line["verdict"] == AGREES and "over 6 runs of 3 objectives" in line["finding"]


def test_the_correlation_of_the_forecast_has_its_interval(agreeing, contrary):
    for found, sign in ((agreeing, 1), (contrary, -1)):
        for _, line in found[found["claim"] == 5].iterrows():
            assert sign * line["value"] > 0.99 and line["low"] <= line["value"] <= line["high"]
    # reads: four matrices in four layers, two seeds of four objectives share their tables' values
    assert agreeing[(agreeing["claim"] == 5) & (agreeing["side"] == "read")]["n"].tolist() == [4 * 4 * 8]


def test_edits_are_judged_at_the_largest_strength_by_the_share_of_layers(agreeing):
    lines = agreeing[(agreeing["claim"] == 6) & (agreeing["side"] == "read")]
    assert lines["n"].tolist() == [4, 4] and lines["value"].tolist() == [1, 1]  # two layers, two seeds
    first, second = lines["finding"]
    # at the largest strength: 0.3 · 2.0, and the median control, number 9 of 0 ... 18: 0.3 · 0.5 · 1.09
    assert first.startswith("p ≤ 0.05 in 4 of 4 places (k); median KL 0.6 against 0.16 nats/token")
    assert second == "the bottom direction does least in 4 of 4 places"


def test_an_edit_along_another_direction_does_not_speak_to_the_claim():
    table = rank1(2.0, 0.5, 0.1)
    table["treatment"] = table["treatment"].replace(["activation", "prediction"], "gradient")
    found = judged([Planted("dpo", {"rank1": table})]).query("claim == 6")
    assert all("bottom" in finding for finding in found["finding"])


def test_surgery_is_judged_against_both_controls(agreeing):
    lines = agreeing[agreeing["claim"] == 7]
    assert len(lines) == 4 and set(lines["side"]) == {"read", "write"}  # for each, two kinds of control
    same = lines.iloc[0]["finding"]
    assert same.startswith("margin falls further than by subspaces of the same dimension in 4 of 4 removals")
    # the median of 19 controls of -0.5 (1 + draw / 100) is the one of draw 9, -0.545
    assert "k = 8: -2 against -0.55 (p = 0.05)" in same


def test_surgery_that_raises_the_margin_disagrees_however_large():
    found = judged([Planted("dpo", {"surgery": study.surgery(2.0, -0.5)})])
    assert set(said(found, 7).values()) == {DISAGREES}


def test_too_few_controls_to_reach_the_level_are_not_a_test():
    line = (
        judged([Planted("dpo", {"surgery": study.surgery(-2.0, -0.5, draws=9)})]).query("claim == 7").iloc[0]
    )
    assert line["verdict"] == UNTESTED
    assert line["finding"] == "9 random subspaces of the same dimension cannot give p ≤ 0.05"


def test_every_verdict_stands_beside_its_claim_and_rule(agreeing, tmp_path: Path):
    assert agreeing[["statement", "rule"]].map(len).min(axis=None) > 20
    agreeing.to_csv(tmp_path / "claims.csv", index=False)
    again = pd.read_csv(tmp_path / "claims.csv", keep_default_na=False)
    assert again["finding"].tolist() == agreeing["finding"].tolist()


def simpo(role: str | None) -> Planted:
    """An alignment by an objective from elsewhere, which says its role or does not."""
    return Planted(
        "dpo",
        {"rsf": rsf(5.0, 1.0)},
        params={"objective": "simpo", "objective._target_": "mylab.SimPO"},
        tags={} if role is None else {"objective.role": role},
    )


def test_an_objective_from_elsewhere_is_judged_by_the_role_that_it_declares():
    assert said(judged([simpo("contrast")]), 2) == {("simpo · style", "write"): AGREES}
    runs = [simpo("contrast"), Planted("ce", {"rsf": rsf(5.0, 3.0)})]
    assert said(judged(runs), 3) == {("simpo · style against ce · style", "write"): AGREES}
    found = judged([simpo("other")])
    assert set(found["verdict"]) == {UNTESTED}
    assert not found["finding"].str.contains("left out").any()


def test_a_run_without_a_role_is_left_out_and_the_claims_say_so():
    found = judged([simpo(None), Planted("dpo", {"rsf": rsf(5.0, 1.0)})])
    for claim in (1, 2, 3):
        (line,) = found[(found["claim"] == claim) & (found["setting"] == "simpo · style")].itertuples()
        assert line.verdict == UNTESTED and line.n == 1
        assert "left out: the objective SimPO declares no role" in line.finding
    assert said(found, 2)["dpo · style", "write"] == AGREES
