"""`experiment=referee` from end to end, with a claim of a user's own in one file outside the repository."""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import os
import re
from pathlib import Path

import pandas as pd
import pytest
from app import ROOT, SMALL, WORLD, Ended, done, run
from configs import composed
from mlflow import MlflowClient

from runners.compose import claims_of, parts
from weightgeom.claims import published

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
GUIDE = (ROOT / "docs/guides/referee.md").read_text()
OWN = re.findall(r"```py\n(.*?)```", GUIDE, re.S)[0]  # the file of the guide, as a reader would copy it
TINY = [*(override for override in SMALL if "behaviour" not in override), *WORLD]
SHORT = ("experiment=referee", "probe.rotation.draws=2", "probe.rsf.resamples=0", "probe.rsf.prompts=0")
MINE = ("referee.claims=[published,mylab.claims.ManyUnmoved]", "allow_targets=[mylab.*]")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "lab/mylab").mkdir(parents=True)
    (home / "lab/mylab/claims.py").write_text(OWN)
    return home


def ran(home: Path, *arguments: str) -> Ended:
    return run(home, *arguments, PYTHONPATH=os.pathsep.join([str(home / "lab"), str(ROOT)]))


@pytest.fixture(scope="module")
def refereed(home: Path) -> Ended:
    return ran(home, *TINY, *SHORT, *MINE)


def table(ended: Ended) -> pd.DataFrame:
    return pd.read_parquet(ended.record / "artifacts/tables/referee.parquet").set_index("claim")


@pytest.mark.slow
def test_every_published_claim_and_a_users_own_have_a_verdict(refereed):
    assert refereed.code == 0, refereed.err
    verdicts = table(refereed)
    assert list(verdicts.index) == [target.rpartition(".")[2] for target in published()] + ["ManyUnmoved"]
    of_several = ["DpoNearOrthogonal", "UniversalSubspaces", "ObjectiveFromSpectrum"]
    elsewhere = ["IntrudersOfAdapters", "UncertaintyUnexpressed", "SafetyOverlaps", *of_several]
    measured = verdicts[~verdicts.index.isin(elsewhere)]
    assert (measured["verdict"] != "not testable here").all()  # an update by DPO, of all weights
    assert measured[["ours", "null", "null_sd"]].notna().to_numpy().all() and (measured["n"] > 0).all()
    assert verdicts.loc["IntrudersOfAdapters", "detail"] == "the update is of no adapter"
    assert "no rows of the probe uncertainty" in verdicts.loc["UncertaintyUnexpressed", "detail"]
    assert verdicts.loc[of_several, "detail"].str.contains("no rows of the probe alignment").all()
    assert "no rows group_overlap" in verdicts.loc["SafetyOverlaps", "detail"]
    assert set(verdicts["trained_by"]) == {"dpo"}
    rows = pd.read_parquet(refereed.record / "artifacts/tables/sparsity.parquet")
    last = rows[(rows["step"] == 2) & (rows["quantity"] == "invisible_share")]["value"]
    assert verdicts.loc["SparseInBf16", "ours"] == pytest.approx(last.mean())
    assert verdicts.loc["SparseInBf16", "n"] == len(last)
    assert (verdicts.loc["SparseInBf16", "verdict"] == "contradicted") == (last.mean() <= 0.5)


@pytest.mark.slow
def test_the_verdicts_stand_at_the_end_of_the_run_in_mlflow_and_on_the_page(home, refereed):
    assert refereed.code == 0, refereed.err
    text = " ".join(refereed.out.split())
    assert "Published claims: " in text and "explained by its null" in text
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("referee")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    there = {artifact.path for artifact in client.list_artifacts(tracked.info.run_id, "tables")}
    assert {"tables/referee.parquet", "tables/referee.csv"} <= there
    page = (home / "outputs/report/referee/index.html").read_text()
    assert '<section id="referee">' in page and "arXiv:2606.07082: Trainings avoid large weights" in page
    assert "Published: overlap with the 30 % smallest weights 31.9 % (SFT)" in page
    assert "Fine-tuning leaves many entries exactly equal." in page
    assert page.count("<tr><td>the update (dpo)</td>") == len(table(refereed))
    kept = pd.read_parquet(home / "outputs/report/referee/tables/referee.parquet")
    assert list(kept["claim"]) == list(table(refereed).index) and kept["run_id"].nunique() == 1


@pytest.mark.slow
def test_a_pair_is_judged_by_what_trained_it(home, refereed):
    assert refereed.code == 0
    ((base,), (trained,)) = (done(home / "outputs", stage) for stage in ("pretraining", "training"))
    pair = (
        *("model=pair", f"model.before={base / 'step-4'}", f"model.after={trained / 'step-2'}"),
        *("objective=none", "device=cpu", "probe.rsf.tokens=256", "report=false", *WORLD, *SHORT),
    )
    ended = ran(home, *pair, "model.stage=dpo")
    assert ended.code == 0, ended.err
    by_training, by_pair = table(refereed), table(ended)
    columns = ["verdict", "ours", "null"]
    same = ["LowMagnitude", "SparseUpdates", "PreservedSpectrum", "NoIntruders"]
    pd.testing.assert_frame_equal(by_pair.loc[same, columns], by_training.loc[same, columns], rtol=1e-6)
    unknown = table(ran(home, *pair))
    assert unknown.loc["LowMagnitude", "verdict"] == "not testable here"
    assert "run it with model.stage=dpo" in unknown.loc["LowMagnitude", "detail"]
    assert unknown.loc["SmallWeights", "verdict"] == by_pair.loc["SmallWeights", "verdict"]


def test_a_claim_from_outside_is_not_imported_unless_it_is_allowed(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"referee\.claims\.0\._target_=elsewhere\.Mine is code from outside"
    ):
        parts(composed("referee.claims=[elsewhere.Mine]"))
    assert not (tmp_path / "imported").exists()


def test_a_class_that_is_no_claim_is_refused_with_the_members_that_it_lacks():
    with pytest.raises(ValueError, match=r"referee\.claims\.0: World is no claim, as it lacks paper, "):
        parts(composed("referee.claims=[weightgeom.data.world.World]"))


def test_the_claims_of_a_list_are_all_published_ones_classes_by_path_and_classes_with_settings():
    assert claims_of({"claims": ["published"]}) == [{"_target_": target} for target in published()]
    given = {"_target_": "mylab.claims.Mine", "level": 0.5}
    assert claims_of({"claims": ["mylab.Mine", given]}) == [{"_target_": "mylab.Mine"}, given]
    assert claims_of({}) == claims_of(None) == []


@pytest.mark.parametrize("wrong", [{"claims": ["small"]}, {"claims": "published"}, {"claim": []}, ["x"], 3])
def test_any_other_list_of_claims_is_refused_with_an_example(wrong):
    with pytest.raises(ValueError, match=r"mylab\.claims\.Mine"):
        claims_of(wrong)
