# pyright: reportAttributeAccessIssue=false
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import study
from study import Planted, rank1, rsf

from weightgeom.analysis.claims import verdicts
from weightgeom.analysis.over_seeds import condense
from weightgeom.analysis.rules import CLAIMS, CONTRADICTED, INCONCLUSIVE, MARGIN, SUPPORTED, UNTESTED
from weightgeom.analysis.settings import settings
from weightgeom.table import COLUMNS

KEYS = ("objective", "variant", "seed", "model", "model_seed", "data", "data_seed", "preference")
PAIR = {
    "model._target_": "weightgeom.bases.pretrained.TwoCheckpoints",
    **{"model": "pair", "model.seed": "", "data.seed": "", "data.preference": "", "data": "text"},
}


def frames(runs: list[Planted]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows and runs that `report.read` finds of a study, without a store."""
    params = [{key: str(value) for key, value in run.all_params.items()} for run in runs]
    described, rows = [], []
    tags = [dict(run.tags) for run in runs]
    for number, (run, setting) in enumerate(zip(runs, settings(params, tags), strict=True)):
        sharp = {"participation_ratio": run.sharpness, "target_energy": 0.5, "alternatives": run.sharpness}
        described.append({"run_id": str(number), **sharp, **setting})
        for name, table in run.tables.items():
            place = {key: setting[key] for key in KEYS} | {"run_id": str(number)}
            before = name.endswith("_pretraining") or (run.objective == "none" and not setting["pair"])
            trajectory = {"trajectory": "pretraining" if before else "training"}
            rows.append(table.assign(**place, **trajectory, table=name.removesuffix("_pretraining")))
    return pd.concat(rows, ignore_index=True), pd.DataFrame(described)


def judged(runs: list[Planted]) -> pd.DataFrame:
    rows, about = frames(runs)
    assert set(COLUMNS) <= set(rows.columns)
    return verdicts(condense(rows, about), about)


def verdicts_on(lines: pd.DataFrame, claim: int) -> dict[tuple[str, str], str]:
    """Verdicts of a claim by setting and side."""
    part = lines[lines["claim"] == claim]
    return dict(zip(zip(part["setting"], part["side"], strict=True), part["verdict"], strict=True))


def trained(
    writes: Sequence[float], objective: str = "dpo", bases: Sequence[int] = (), **named: object
) -> list[Planted]:
    """A run for each write ratio, all of one setting, on one base or the given ones."""
    return [
        Planted(objective, {"rsf": rsf(5.0, write)}, seed=n, base=bases[n] if bases else 0, **named)  # type: ignore
        for n, write in enumerate(writes)
    ]


@pytest.fixture(scope="module")
def agreeing() -> pd.DataFrame:
    return judged(study.agreeing())


@pytest.fixture(scope="module")
def contrary() -> pd.DataFrame:
    return judged(study.contrary())


@pytest.mark.slow
@pytest.mark.parametrize("claim", [claim.number for claim in CLAIMS])
def test_a_planted_claim_is_supported(agreeing, claim):
    verdicts_of = verdicts_on(agreeing, claim)
    aside = {INCONCLUSIVE} if claim == 3 else set()  # graded/sequence_tau1 writes 1.3
    assert SUPPORTED in verdicts_of.values() and set(verdicts_of.values()) <= {SUPPORTED} | aside | (
        {CONTRADICTED} if claim == 3 else set()
    )


@pytest.mark.slow
@pytest.mark.parametrize("claim", [claim.number for claim in CLAIMS])
def test_the_planted_opposite_contradicts(contrary, claim):
    verdicts_of = verdicts_on(contrary, claim)
    assert CONTRADICTED in verdicts_of.values() and SUPPORTED not in verdicts_of.values()


def test_what_no_run_measured_is_said_to_be_not_tested_and_how_to_test_it():
    lines = judged([Planted("dpo", {"rsf": rsf(5.0, 1.0)})]).drop_duplicates("claim")
    verdict = lines.set_index("claim")
    for claim in range(4, 10):
        assert verdict.loc[claim, "verdict"] == UNTESTED
        assert "no run measured it: weightgeom run" in verdict.loc[claim, "finding"]
        assert verdict.loc[claim, "n"] == 0 and pd.isna(verdict.loc[claim, "value"])


def test_a_single_training_tests_nothing():
    tables = {
        "rsf": rsf(9.0, 1.0),
        "rsf_pretraining": rsf(5.0, 3.0, increments=3.0),
        "rank1": rank1(2.0, 0.5, 0.1),
    }
    runs = [Planted("dpo", tables), Planted("ce", {"rsf": rsf(5.0, 3.0)})]
    lines = judged(runs)
    assert set(lines["verdict"]) == {UNTESTED}
    line = lines[(lines["claim"] == 1)].iloc[0]
    assert (
        line["finding"].startswith("ratio of q and k 9.00 in 1 training, where a test needs 2")
        and line["n"] == 1
    )


def test_copies_of_a_training_count_once():
    lines = judged(trained([1.0, 1.0, 1.0]))
    assert verdicts_on(lines, 3) == {("dpo · style", "write"): UNTESTED}


def test_edits_without_a_bottom_direction_but_of_another_layer_are_judged():
    runs = []
    for seed in range(3):
        table = rank1(2.0 + 0.1 * seed**2, 0.5, 0.1)
        layer = table["treatment"].where(table["treatment"] != "bottom", "layer")
        table = table.assign(treatment=layer, arm=layer + "@" + table["dose"])
        params = {"intervention.rank1.match": "output"}
        runs.append(Planted("dpo", {"rank1": table}, seed=seed, base=seed, params=params))
    lines = judged(runs)
    assert set(verdicts_on(lines, 8).values()) == {SUPPORTED}
    assert not lines["finding"].str.contains("bottom").any()


def test_a_write_ratio_within_the_margin_is_near_isotropic_and_chance_is_not():
    # sd / √3 = 0.006, t(2) of ln(1.25) / 0.006: well within; 5 tests in the family
    assert verdicts_on(judged(trained([1.0, 1.01, 1.02])), 3) == {("dpo · style", "write"): SUPPORTED}
    # a mean of 1.2 with seeds from 0.8 to 1.6 excludes neither 1.25 nor more
    assert verdicts_on(judged(trained([0.8, 1.2, 1.6])), 3) == {("dpo · style", "write"): INCONCLUSIVE}
    assert verdicts_on(judged(trained([3.0, 3.01, 3.02])), 3) == {("dpo · style", "write"): CONTRADICTED}


def test_the_number_is_the_geometric_mean_with_students_interval():
    from math import exp, log, sqrt

    line = judged(trained([1.0, 1.2, 1.44])).query("claim == 3").iloc[0]
    # logarithms 0, a, 2a with a = ln 1.2: mean a, sd a, t(2; 0.975) = 4.3027
    a = log(1.2)
    assert line["value"] == pytest.approx(1.2) and line["n"] == 3
    assert line["low"] == pytest.approx(exp(a - 4.3027 * a / sqrt(3)), abs=1e-4)
    assert line["high"] == pytest.approx(exp(a + 4.3027 * a / sqrt(3)), abs=1e-4)


def test_p_values_are_holms_over_all_tests():
    lines = judged(trained([1.0, 1.01, 1.02]))
    (supported,) = lines[lines["verdict"] != UNTESTED].itertuples()
    two = judged(trained([1.0, 1.01, 1.02]) + trained([1.0, 1.01, 1.02], params={"objective.beta": 0.5}))
    tested = two[two["verdict"] != UNTESTED]
    assert tested["p_for"].tolist() == pytest.approx([2 * supported.p_for] * 2)


def test_alignment_writes_less_than_pretraining_by_base_and_than_its_peers_by_training():
    runs = [
        Planted(
            "dpo",
            {"rsf": rsf(5.0, 1.0 + 0.01 * base), "rsf_pretraining": rsf(5.0, 3.0 + 0.02 * base)},
            seed=seed, base=base,
        )
        for seed, base in ((0, 0), (1, 0), (0, 1), (0, 2))
    ]  # fmt: skip
    lines = judged(runs)
    (line,) = lines[lines["claim"] == 4].itertuples()
    assert line.verdict == SUPPORTED and line.n == 3 and "3 bases" in line.finding
    one_base = judged([run for run in runs if run.base == 0])
    assert verdicts_on(one_base, 4) == {("dpo · style against pretraining", "write"): UNTESTED}


def test_only_settings_of_one_base_and_preference_are_compared():
    facts = {"data.preference": "facts"}
    runs = [*trained([1.0, 1.01, 1.02]), *trained([3.0, 3.01, 3.02], "ce")]
    runs += [*trained([4.5, 4.51, 4.52], params=facts), *trained([4.0, 4.01, 4.02], "ce", params=facts)]
    runs += trained([2.0, 2.01, 2.02], "ce", params={"model.d_model": 64})
    runs = [Planted(**{**vars(run), "params": {"model.d_model": 128, **run.params}}) for run in runs]
    lines = judged(runs)
    against = [name for name, _ in verdicts_on(lines, 4)]
    assert len(against) == 2 and all("d_model=128" in name and "d_model=64" not in name for name in against)
    by_preference = {("style" in setting): verdict for (setting, _), verdict in verdicts_on(lines, 4).items()}
    assert by_preference == {True: SUPPORTED, False: CONTRADICTED}


def test_runs_that_differ_in_more_than_seeds_are_not_pooled():
    runs = [Planted("dpo", {"rsf": rsf(5.0, 1.0)}, params={"training.steps": steps}) for steps in (64, 128)]
    runs.append(Planted("dpo", {"rsf": rsf(5.0, 1.0)}, params={"objective.beta": 0.5}))
    assert list(verdicts_on(judged(runs), 3)) == [
        ("dpo beta=0.1 · style · training.steps=128", "write"),
        ("dpo beta=0.1 · style · training.steps=64", "write"),
        ("dpo beta=0.5 · style · training.steps=64", "write"),
    ]


@pytest.mark.parametrize(
    "key", ["probe.rsf.increments", "probe.behaviour.tokens", "intervention.rank1.tokens"]
)
def test_runs_that_were_measured_otherwise_are_settings_of_their_own(key):
    runs = [Planted("dpo", {"rsf": rsf(5.0, 1.0)}, seed=n, params={key: n}) for n in (0, 1)]
    assert judged(runs).query("claim == 3")["n"].tolist() == [1, 1]


def test_a_newer_run_of_the_same_setting_and_seeds_stands_for_the_older():
    runs = [Planted("dpo", {"rsf": rsf(5.0, write)}) for write in (3.0, 1.0)]
    line = judged(runs).query("claim == 3").iloc[0]
    assert line["n"] == 1 and "1.00 in 1 training" in line["finding"]


def pair(before: str, after: str, write: float, stage: str | None) -> Planted:
    params = {**PAIR, "model.before": before, "model.after": after, "model.stage": stage}
    return Planted("none", {"rsf": rsf(5.0, write, steps=(1,))}, params=params)


def test_a_pair_is_judged_only_when_the_user_says_what_trained_it():
    lines = judged([pair("a", "b", 1.0, None)])
    line = lines[lines["claim"] == 3].iloc[0]
    assert line["verdict"] == UNTESTED and line["setting"] == "a → b"
    assert "run it again with model.stage=dpo" in line["finding"]
    pairs = [pair(f"a{n}", f"b{n}", 1 + 0.01 * n, "dpo") for n in range(3)]
    line = judged(pairs).query("claim == 3").iloc[0]
    assert (line["setting"], line["verdict"], line["n"]) == ("dpo", SUPPORTED, 3)


def test_fewer_than_five_objectives_are_not_ordered():
    runs = [
        Planted(objective, {"rsf": rsf(5.0, 1.0 + n)}, sharpness=1.0 + n)
        for n, objective in enumerate(("graded/dpo", "graded/ce", "graded/token_tau01"))
    ]
    line = judged(runs).query("claim == 6").iloc[0]
    assert line["verdict"] == UNTESTED
    assert line["finding"] == "3 objectives, where the order of 5 is tested"


def test_the_order_of_objectives_is_tested_and_not_that_of_runs():
    order = (1.0, 2.0, 1.5, 1.2, 1.8, 1.1)
    runs = [
        Planted(name, {"rsf": rsf(5.0, write + 0.01 * seed)}, sharpness=1.0 + n, seed=seed)
        for n, (name, write) in enumerate(zip(study.SHARP, order, strict=False))
        for seed in range(5)
    ]
    line = judged(runs).query("claim == 6").iloc[0]
    assert line["verdict"] == INCONCLUSIVE and line["n"] == 6
    assert "over 6 objectives in 30 trainings" in line["finding"]


@pytest.mark.slow
def test_the_forecast_needs_three_trainings_and_has_the_jackknifes_interval(agreeing):
    lines = agreeing[agreeing["claim"] == 7]
    assert set(lines["verdict"]) == {SUPPORTED}
    assert (lines["low"] <= lines["value"]).all() and (lines["value"] <= lines["high"]).all()
    two = judged([Planted("dpo", {"moments": study.moments(1, n)}, seed=n) for n in (0, 1)])
    line = two[two["claim"] == 7].iloc[0]
    assert (
        line["verdict"] == UNTESTED
        and "2 trainings, where a correlation over trainings needs 3" in line["finding"]
    )


def test_edits_of_equal_norm_are_shown_and_not_judged():
    runs = [Planted("dpo", {"rank1": rank1(2.0 + n, 0.5, 0.1)}, seed=n) for n in range(3)]
    lines = judged(runs).query("claim == 8")
    assert set(lines["verdict"]) == {UNTESTED}
    assert lines["finding"].str.contains("edits of equal Frobenius norm are not judged").all()
    output = {"intervention.rank1.match": "output"}
    runs = [
        Planted("dpo", {"rank1": rank1(2.0 + 0.01 * n, 0.5, 0.1)}, seed=n, params=output) for n in range(3)
    ]
    lines = judged(runs).query("claim == 8")
    assert set(lines["verdict"]) == {SUPPORTED}
    assert lines["finding"].str.contains("p ≤ 0.05 in 6 of 6 places").all()


def test_an_edit_along_another_direction_does_not_speak_to_the_claim():
    table = rank1(2.0, 0.5, 0.1)
    table["treatment"] = table["treatment"].replace(["activation", "prediction"], "gradient")
    lines = judged([Planted("dpo", {"rank1": table})]).query("claim == 8")
    assert all("no run measured it" in finding for finding in lines["finding"])


def test_surgery_is_judged_against_both_controls(agreeing):
    lines = agreeing[agreeing["claim"] == 9]
    assert len(lines) == 4 and set(lines["side"]) == {"read", "write"}  # for each, two kinds of control
    assert "against subspaces of the same dimension; k = 8: -2" in lines.iloc[0]["finding"]
    raised = [Planted("dpo", {"surgery": study.surgery(2.0 + 0.1 * n, -0.5)}, seed=n) for n in range(3)]
    assert set(verdicts_on(judged(raised), 9).values()) == {CONTRADICTED}


def test_every_verdict_is_shown_with_its_claim_and_rule(agreeing, tmp_path: Path):
    assert agreeing[["statement", "rule"]].map(len).min(axis=None) > 20
    agreeing.to_csv(tmp_path / "claims.csv", index=False)
    again = pd.read_csv(tmp_path / "claims.csv", keep_default_na=False)
    assert again["finding"].tolist() == agreeing["finding"].tolist()
    assert all(str(MARGIN) in claim.rule for claim in CLAIMS[:3])


def simpo(role: str | None) -> list[Planted]:
    """An alignment by an objective from elsewhere, which says its role or does not."""
    params = {"objective": "simpo", "objective._target_": "mylab.SimPO"}
    tags = {} if role is None else {"objective.role": role}
    return trained([1.0, 1.01, 1.02], params=params, tags=tags)


def test_an_objective_from_elsewhere_is_judged_by_the_role_that_it_declares():
    assert verdicts_on(judged(simpo("contrast")), 3) == {("simpo · style", "write"): SUPPORTED}
    runs = [*simpo("contrast"), *trained([3.0, 3.01, 3.02], "ce")]
    assert verdicts_on(judged(runs), 4) == {("simpo · style against ce · style", "write"): SUPPORTED}
    lines = judged(simpo("other"))
    assert set(lines["verdict"]) == {UNTESTED}
    assert not lines["finding"].str.contains("left out").any()


def test_a_run_without_a_role_is_left_out_and_the_claims_say_so():
    lines = judged([*simpo(None), *trained([1.0, 1.01, 1.02])])
    for claim in (1, 2, 3, 4):
        (line,) = lines[(lines["claim"] == claim) & (lines["setting"] == "simpo · style")].itertuples()
        assert line.verdict == UNTESTED and line.n == 3
        assert "left out: the objective SimPO declares no role" in line.finding
    assert verdicts_on(lines, 3)["dpo · style", "write"] == SUPPORTED
