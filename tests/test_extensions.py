"""A probe, an objective and an intervention outside the repository, from end to end."""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import json
import os
import shutil
from pathlib import Path

import outside
import pandas as pd
import pytest
from app import ROOT, SMALL, WORLD, Ended, done, run
from mlflow import MlflowClient

from runners.report import __main__ as report

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
TINY = [*(override for override in SMALL if not override.startswith("probe.")), *WORLD]
PROBES = (
    "probe=[rsf]",
    "probe.rsf.tokens=256",
    "+probe.rsf16={_target_: weightgeom.probes.rsf.RSF, k: 16, tokens: 256, resamples: 0}",
    "+probe.norms={_target_: mylab.probes.SpectralNorm}",
    "+probe.growth={_target_: mylab.probes.Growth}",
)
DAMP = "+intervention.damp={_target_: mylab.damp.Damp}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def lab(home: Path) -> Path:
    return outside.write(home / "lab")


def ran(home: Path, *arguments: str) -> Ended:
    lab = home / "lab"
    path = os.pathsep.join([str(lab), str(ROOT)])
    mine = ("--config-dir", str(lab / "conf"), "allow_targets=[mylab.*]")
    return run(home, *mine, *arguments, PYTHONPATH=path)


@pytest.fixture(scope="module")
def aligned(home: Path, lab: Path) -> Ended:
    return ran(home, *TINY, *PROBES, DAMP, "objective=simpo", "name=outside")


def table(ended: Ended, name: str) -> pd.DataFrame:
    return pd.read_parquet(ended.record / f"artifacts/tables/{name}.parquet")


def test_all_of_it_is_seen_in_the_terminal(aligned):
    assert aligned.code == 0, aligned.err
    lines = [line.strip() for line in aligned.out.splitlines()]
    ratios = [f"Relative subspace fraction ({name})" for name in ("rsf", "rsf16")]
    growths = [f"Growth of the norm (growth){of}" for of in ("", ", in the pretraining")]
    assert {*ratios, *growths, "Norms"} <= set(lines)
    assert "spectral norm at step 0" in aligned.out
    text = " ".join(aligned.out.split())  # a title may take two lines
    assert "Damping (damp): kl_from_unedited (nats/token) against the median of random controls" in text
    assert "declares no role" not in aligned.out


def test_all_of_it_is_seen_in_mlflow(home, aligned):
    assert aligned.code == 0
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("outside")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.data.tags["objective.role"] == "contrast"
    metrics = tracked.data.metrics
    norms = table(aligned, "norms").query("quantity == 'spectral_norm' and matrix == 'q' and step == 2")
    assert metrics["norms/q"] == pytest.approx(norms["value"].mean())
    wanted = {"rsf16/q", "norms_by_layer/q", "growth/mean_growth", "damp_by_layer/q", "train/loss"}
    assert wanted | {"train/participation_ratio"} <= set(metrics)


def test_all_of_it_is_drawn(aligned):
    assert aligned.code == 0
    drawn = {path.stem for path in (aligned.record / "artifacts/figures").glob("*.png")}
    ratios = ("ratio_by_step", "ratio_by_layer", "ratio_by_layer_pretraining")
    generic = ("by_step", "by_layer", "by_layer_pretraining")
    assert drawn == {
        *ratios,
        *(f"rsf16_{name}" for name in ratios),
        *(f"{probe}_{name}" for probe in ("norms", "growth") for name in generic),
        *("growth_whole", "damp_effects"),
    }


def test_an_objective_of_chosen_and_rejected_has_levels_that_its_gradients_predict(aligned):
    assert aligned.code == 0
    levels = table(aligned, "rsf").query("quantity == 'matched_ratio' and role == 'write'")
    assert len(levels) and (levels["value"] > 0).all()


def test_the_report_has_a_section_for_each_without_their_classes(home, aligned, monkeypatch):
    assert aligned.code == 0
    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert report.main(["outside"]) == 0
    page = (home / "outputs/report/outside/index.html").read_text()
    for heading in ("rsf16", "norms", "Norms", "Damping"):
        assert f"<h2>{heading}</h2>" in page
    claims = pd.read_parquet("outputs/report/outside/tables/claims.parquet").set_index("claim")
    assert set(claims["verdict"]) == {"not tested"}  # a single training
    assert claims.loc[[1, 3], "finding"].str.contains("in 1 training, where a test needs 2").all()


def test_an_objective_without_a_role_is_told_of_at_the_end_and_left_out(home, lab, monkeypatch):
    ended = ran(home, *TINY, "probe=[rsf]", "probe.rsf.tokens=256", "objective=roleless", "name=roleless")
    assert ended.code == 0, ended.err
    assert "the claims leave this run out, as SimPO declares no role" in " ".join(ended.out.split())
    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert report.main(["roleless"]) == 0
    claims = pd.read_parquet("outputs/report/roleless/tables/claims.parquet")
    assert claims[claims["claim"] <= 3]["finding"].str.contains("the objective SimPO declares no role").all()


def test_a_chain_has_a_row_of_every_probe_that_compares(home, aligned):
    assert aligned.code == 0
    (base,) = done(home / "outputs", "pretraining")
    trained = min(done(home / "outputs", "training"), key=lambda path: (path / "DONE").stat().st_mtime)
    stages = {"base": base / "step-1", "more": base / "step-4", "simpo": trained / "step-2"}
    for name, source in stages.items():
        shutil.copytree(source, home / name)
    named = ", ".join(f"{name}: {home / name}" for name in stages)
    chain = ("model=chain/own", f"model.stages={{{named}}}", "objective=none", "device=cpu", "name=chain")
    ended = ran(home, *WORLD, *PROBES, *chain)
    assert ended.code == 0, ended.err
    stages_table = table(ended, "stages")
    pairs = [("more", "base"), ("simpo", "base"), ("simpo", "more")]
    for probe, headline in (
        ("rsf", "ratio"),
        ("rsf16", "ratio"),
        ("norms", "spectral_norm"),
        ("growth", "growth"),
    ):
        mine = stages_table[(stages_table["probe"] == probe) & (stages_table["quantity"] == headline)]
        assert list(mine[["stage", "against"]].drop_duplicates().itertuples(index=False, name=None)) == pairs
        assert ", by stage" in " ".join(ended.out.split())
    drawn = {path.stem for path in (ended.record / "artifacts/figures").glob("*.png")}
    assert {"stages", "rsf16_stages", "norms_by_stage", "growth_by_stage"} <= drawn
    assert json.loads((ended.record / "status.json").read_text())["status"] == "FINISHED"


def test_a_headline_without_a_row_is_refused_with_the_quantities_that_there_are(home, lab):
    path = lab / "mylab/wrong.py"
    path.write_text(
        (lab / "mylab/probes.py").read_text().replace('headline = "spectral_norm"', 'headline = "norm"')
    )
    ended = ran(home, *TINY, "probe=[]", "+probe.norms={_target_: mylab.wrong.SpectralNorm}")
    assert ended.code == 1
    (error,) = ended.errors
    assert "probe.norms declares the headline 'norm', but no matrix has such a row" in error
    assert "declare one of spectral_norm, frobenius_norm" in error


def test_a_class_without_a_declaration_is_refused_before_anything_runs(home, lab):
    (lab / "mylab/bare.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Bare:\n    a: int = 1\n"
    )
    ended = ran(home, *TINY, "probe=[]", "+probe.bare={_target_: mylab.bare.Bare}", "outputs=none")
    assert ended.code == 1 and "probe.bare: Bare is no probe, as it lacks declaration" in ended.err
    assert not (home / "none/pretraining").exists()
