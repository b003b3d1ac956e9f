# pandas types the results of indexing as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from socket import socket
from typing import Any

import pandas as pd
import pytest
import study
from app import ROOT, environment
from asked import bypassed, probed
from study import Planted, publish, rank1, rsf

from runners.launcher.usage import Usage
from runners.report import collect
from runners.report.__main__ import main
from runners.report.make import directory_of
from runners.tracking.publisher import Publication
from runners.tracking.record import Record
from runners.tracking.stores import open_store
from weightgeom.analysis.claims_uncertainty import CLAIMS, COUPLED
from weightgeom.declarations import InterventionDeclaration, ProbeDeclaration, recorded
from weightgeom.probes.rsf import RSF
from weightgeom.table import ADDED, COLUMNS, row, tabulate

# MLflow's own; it appears when its sqlite store is opened for the first time.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
ABOUT = [
    *("experiment", "run_id", "run_name", "objective", "variant", "seed", "model", "model_seed", "data"),
    *("data_seed", "preference", "trajectory", "table"),
]
HOSTILE = "<script>alert('x')</script>"
BROWSER = shutil.which("chromium")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several experiments: all claims planted, hardly anything, hostile names, and no end."""
    directory = tmp_path_factory.mktemp("outputs")
    bare = Planted("dpo", {"rsf": rsf(5.0, 1.0)}, experiment="bare")
    hostile = {
        **{"name": HOSTILE, "experiment": f"a/{HOSTILE}"},
        **{"params": {"model": HOSTILE, "training.optimizer": HOSTILE, "data.preference": "<b>"}},
    }
    runs = [
        *study.agreeing(),
        Planted("ce", {}, name="broken off", status="FAILED"),
        bare,
        Planted("dpo", {"rsf": rsf(5.0, 2.0)}, **hostile),
        Planted("dpo", {}, experiment="unfinished", status="KILLED"),
        *unsure(),
        *elsewhere_made(),
    ]
    publish(directory / "records", f"sqlite:///{directory}/mlflow.db", runs)
    swept(directory / "records", f"sqlite:///{directory}/mlflow.db")
    return directory


def swept(records: Path, uri: str) -> None:
    """Two sweeps of one experiment, one under SLURM."""
    for name, tags in (("sweep here", {}), ("sweep seed=0,1", Usage(2.5, 0.5, 3.0).tags())):
        about: dict[str, Any] = {"params": {"overrides": name}, "tags": tags, "inputs": []}
        record = Record.create(
            records / name, experiment="elsewhere", name=name, tracking_uri=uri, kind="sweep", **about
        )
        record.end("FINISHED")
        Publication(record, uri).publish(artifacts=True)


def unsure() -> list[Planted]:
    """A study of uncertainty: two trainings of one base, one of them with an intervention."""
    after = {"fisher_ratio": (0.9, 0.8, 1.0)}  # the base has 0.3
    tables = {
        "uncertainty_pretraining": tabulate(probed()),
        "uncertainty": tabulate([*probed(), *probed(after, step=64)]),
        "rsf": rsf(5.0, 2.0),
    }
    runs = (("ce", tables | {"bypass": bypassed()}), ("dpo", tables | {"rsf": rsf(4.0, 1.0)}))
    return [Planted(objective, tables, experiment="unsure") for objective, tables in runs]


def elsewhere_made() -> list[Planted]:
    """Two seeds of a run with a second RSF, and a probe and an intervention whose classes are nowhere."""
    gaps = tabulate(
        row("gap", 2.0 + layer, n=9, step=64, layer=layer, matrix="q", role="read") for layer in (0, 1)
    )
    gaps.attrs["declaration"] = recorded(ProbeDeclaration("gap", label="the gap", section="Gaps & more"))
    damped = rank1(2.0, 0.5, 0.1)
    damped.attrs["declaration"] = recorded(InterventionDeclaration(("kl_from_unedited",), ("random",)))
    second = rsf(3.0, 1.0).copy()
    second.attrs["declaration"] = recorded(RSF.declaration)
    tables = {"rsf": rsf(5.0, 1.0), "rsf16": second, "gap": gaps, "damp": damped}
    return [Planted("dpo", tables, experiment="elsewhere", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def uri(outputs: Path) -> str:
    return f"sqlite:///{outputs}/mlflow.db"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def report(outputs: Path) -> Path:
    """The report on the study in which all is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert main(["study", "--outputs", str(outputs)]) == 0
    return outputs / "report/study"


class Page(HTMLParser):
    """The files that a page loads, its links, and the text that it shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + " "

    def values(self, tag: str, key: str) -> list[str]:
        return [str(attributes[key]) for name, attributes in self.tags if name == tag and key in attributes]


def test_collect_gives_every_row_of_every_finished_run_with_what_it_is_of(uri):
    rows = collect("study", tracking_uri=uri)
    assert list(rows.columns) == [*ABOUT, *COLUMNS]
    planted = study.agreeing()
    assert len(rows) == sum(len(table) for run in planted for table in run.tables.values())
    assert rows["run_id"].nunique() == len(planted)
    aligned = rows[(rows["objective"] == "dpo") & (rows["seed"] == 1) & (rows["trajectory"] == "pretraining")]
    assert set(aligned["table"]) == {"rsf"} and set(aligned["preference"]) == {"style"}
    pd.testing.assert_frame_equal(
        aligned[list(COLUMNS)].reset_index(drop=True), planted[len(study.SHARP)].tables["rsf_pretraining"]
    )


def test_collect_reads_the_tables_of_an_earlier_version_as_todays(tmp_path):
    today = study.rank1(2.0, 0.5, 0.1)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    publish(tmp_path / "records", store, [Planted("dpo", {"rank1": today.drop(columns=list(ADDED))})])
    pd.testing.assert_frame_equal(collect("study", tracking_uri=store)[list(COLUMNS)], today)


def test_collect_reads_several_experiments_and_the_store_that_the_environment_names(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    rows = collect("study", "bare")
    assert set(rows["experiment"]) == {"study", "bare"}
    assert len(rows) == len(collect("study")) + len(collect("bare"))


def test_the_report_holds_tables_as_csv_and_parquet_and_figures_as_png_and_pdf(report):
    figures, tables = report / "figures", report / "tables"
    for name in ("asymmetry", "trajectory", "graded_control_0", "mechanism", "rank1_by_layer_0", "surgery_0"):
        assert (figures / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (figures / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    for name in ("runs", "claims", "asymmetry", "trajectory", "mechanism", "rank1", "surgery", "behaviour"):
        table = pd.read_parquet(tables / f"{name}.parquet")
        assert len(table) and len(pd.read_csv(tables / f"{name}.csv")) == len(table)
    rows = pd.read_parquet(tables / "rows.parquet")
    assert len(rows) == len(pd.read_csv(tables / "rows.csv.gz", low_memory=False)) > 1000


def test_the_page_loads_nothing_and_what_it_links_to_is_there(report):
    page = Page(report / "index.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    images = page.values("img", "src")
    assert len(images) > 6 and all(image.startswith("data:image/png;base64,") for image in images)
    assert all(len(alt) > 40 for alt in page.values("img", "alt"))
    assert "url(" not in (report / "index.html").read_text()
    identities = {str(attributes["id"]) for _, attributes in page.tags if "id" in attributes}
    for link in page.values("a", "href"):
        assert link[1:] in identities if link.startswith("#") else (report / link).is_file(), link


def test_the_page_says_what_was_run_and_where_it_stands_to_every_claim(report):
    text = Page(report / "index.html").text
    assert (
        "Of the paper's 9 claims this study supports 8 wherever it tests them; it has different verdicts on 1"
        " in different settings."
    ) in text  # graded/sequence_tau1 writes 1.3
    for section in ("What was run", "The asymmetry", "The trajectory", "The mechanism", "Rank-1 edits"):
        assert section in text
    assert "c0ffeec0f + uncommitted changes" in text and "world-style abababababab" in text
    assert "objective dpo" in text and "beta=0.1" in text and "training steps=64" in text
    assert "Not measured." not in text
    assert "Run broken off is FAILED and not part of this report." in text
    # dpo: three seeds of 1.053, 1.062 and 1.078; t(2; 0.975) = 4.303, so ± 4.303 · 0.0128 / √3
    assert "1.06 [1.03, 1.10]" in text and "3 trainings" in text


def test_the_page_has_the_hours_and_the_memory_of_sweeps_under_slurm(outputs, report):
    assert main(["elsewhere", "--outputs", str(outputs)]) == 0
    text = " ".join(Page(outputs / "report/elsewhere/index.html").text.split())
    assert "Sweeps under SLURM sweep hours lost hours peak memory (GiB) sweep seed=0,1 2.50 0.50 3.00" in text
    assert "sweep here" not in text and "Sweeps under SLURM" not in Page(report / "index.html").text


def test_missing_parts_are_named_with_the_command_that_measures_them(outputs, capsys):
    assert main(["bare", "--outputs", str(outputs)]) == 0
    assert f"report: {outputs}/report/bare/index.html" in capsys.readouterr().out
    text = Page(outputs / "report/bare/index.html").text
    for what in (
        "graded control",
        "mechanism",
        "rank-1 edits",
        "surgery on the update",
        "What the trainings achieved",
        "Uncertainty, the companion paper",
    ):
        assert f"{what}: no finished run" in text
    assert "weightgeom run experiment=graded_control -m name=bare" in text
    assert "Seeds: one a setting, so no interval over seeds." in text
    assert text.count("not tested") >= 9 and "1 training" in text


def test_uncertainty_has_its_claims_figures_and_bridge_where_it_was_measured(outputs):
    assert main(["unsure", "--outputs", str(outputs)]) == 0
    place = outputs / "report/unsure"
    text = Page(place / "index.html").text
    claims = pd.read_parquet(place / "tables/claims_uncertainty.parquet")
    # One base, whatever was trained from it: a line for each claim.
    assert list(claims["claim"]) == [*CLAIMS, COUPLED] and set(claims["verdict"]) == {"supported"}
    assert set(claims["setting"]) == {"tiny · world, seed 0"}
    assert all(f"{claim[:1].upper()}{claim[1:]}." in text for claim in claims["claim"])
    assert "abstention +0.60, false abstention +0.10" in text
    bridge = pd.read_parquet(place / "tables/bridge.parquet")
    change = bridge[bridge["quantity"] == "fisher_ratio"].groupby(["run", "role"])[["change", "rsf"]].mean()
    # 0.3 to 0.9, a hundredth more in the second layer.
    assert change.loc[("ce", "write")].round(6).tolist() == [0.603, 2.0]
    assert change.loc[("dpo", "read")].round(6).tolist() == [0.603, 4.0]
    for name in ("uncertainty_profiles", "uncertainty_sensitivity", "abstentions", "bridge"):
        assert (place / f"figures/{name}.png").stat().st_size > 5000
    assert "Uncertainty, the companion paper: no finished run" not in text


def test_tables_of_classes_that_are_nowhere_have_sections_of_their_own(outputs):
    assert main(["elsewhere", "--outputs", str(outputs)]) == 0
    directory = outputs / "report/elsewhere"
    page = (directory / "index.html").read_text()
    for heading in ("rsf16", "Gaps &amp; more", "damp"):
        assert f"<h2>{heading}</h2>" in page
    text = Page(directory / "index.html").text
    assert "By the table gap of the runs, at the last step" in text
    means = pd.read_parquet(directory / "tables/gap.parquet")
    assert means["value"].tolist() == [2.5, 2.5] and means["matrix"].tolist() == ["q", "q"]
    ratios = pd.read_parquet(directory / "tables/asymmetry.parquet").query("matrix == 'q'")["ratio"]
    assert ratios.tolist() == pytest.approx([5.0])  # of the first instance alone
    figures = {path.stem for path in (directory / "figures").glob("*.png")}
    assert {"asymmetry", "rsf16_0", "gap_0", "damp_0"} <= figures


def test_a_second_report_replaces_the_figures_of_the_first(outputs):
    stale = outputs / "report/bare/figures/mechanism.png"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_bytes(b"")
    assert main(["bare", "--outputs", str(outputs)]) == 0
    assert not stale.exists() and (stale.parent / "asymmetry.png").exists()


def test_nothing_that_a_run_is_called_becomes_html(outputs):
    name = f"a/{HOSTILE}"
    assert main([name, "--outputs", str(outputs)]) == 0
    path = directory_of(outputs, [name]) / "index.html"
    assert path.is_relative_to(outputs / "report") and path.parent.parent == outputs / "report"
    page = Page(path)
    assert "script" not in {tag for tag, _ in page.tags} and "b" not in {tag for tag, _ in page.tags}
    assert HOSTILE in page.text and "dpo · <b>" in page.text


@pytest.mark.parametrize(
    ("name", "plain"), [("../up", "_up"), ("..", "_"), ("a/b c", "a_b_c"), ("ok-1.2", "ok-1.2")]
)
def test_an_experiments_name_stays_inside_the_reports(tmp_path, name, plain):
    assert directory_of(tmp_path, [name]) == tmp_path / "report" / plain
    assert directory_of(tmp_path, [name, "x"]) == tmp_path / "report" / f"{plain}+x"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that the command says when it fails."""
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_an_unknown_experiment_is_refused_with_those_that_exist(outputs, capsys):
    line = refused(capsys, "studdy", "--outputs", str(outputs))
    assert "no experiment 'studdy' at sqlite:///" in line
    assert "did you mean 'study'? valid: Default, a/" in line and "unfinished" in line


def test_an_experiment_without_a_finished_run_is_refused(outputs, capsys):
    line = refused(capsys, "unfinished", "--outputs", str(outputs))
    assert "no finished run in unfinished" in line and "(runs: KILLED)" in line


def test_a_store_that_is_not_there_is_refused_and_not_made(tmp_path, capsys):
    line = refused(capsys, "study", "--outputs", str(tmp_path / "none"))
    assert f"no MLflow store at {tmp_path}/none/mlflow.db" in line
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_no_store_is_refused(tmp_path, capsys):
    (tmp_path / "mlflow.db").write_text("not a database, whatever it is called" * 100)
    assert "no answer from MLflow at sqlite:///" in refused(capsys, "study", "--outputs", str(tmp_path))


def test_a_server_that_does_not_answer_is_refused(tmp_path, capsys):
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://me:hunter2@127.0.0.1:{free.getsockname()[1]}"
    line = refused(capsys, "study", "--outputs", str(tmp_path), "--tracking-uri", uri)
    assert "no answer from MLflow at http://***@127.0.0.1" in line and "hunter2" not in line


def test_artifacts_that_are_gone_are_refused_by_the_name_of_their_run(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    publish(tmp_path / "records", uri, [Planted("dpo", {"rsf": rsf(5.0, 1.0)}, name="moved away")])
    (table,) = (tmp_path / "mlflow-artifacts").rglob("rsf.parquet")
    table.write_bytes(b"PAR1")
    line = refused(capsys, "study", "--outputs", str(tmp_path))
    assert "the artifacts of run 'moved away'" in line and "lack tables/rsf.parquet, or it cannot be" in line
    shutil.rmtree(tmp_path / "mlflow-artifacts")
    line = refused(capsys, "study", "--outputs", str(tmp_path))
    assert "'moved away'" in line and "hold no tables: they were moved or deleted" in line


def test_a_table_of_other_columns_is_refused(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    table = rsf(5.0, 1.0).drop(columns="unit")
    publish(tmp_path / "records", uri, [Planted("dpo", {"rsf": table})])
    line = refused(capsys, "study", "--outputs", str(tmp_path))
    assert "is no table of ours: it has no unit" in line


def test_help_is_there_at_once():
    command = [sys.executable, "-X", "importtime", "-m", "runners.report", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--tracking-uri" in shown.stdout and "NAME" in shown.stdout
    for heavy in ("mlflow", "pandas", "torch", "matplotlib"):
        assert f" {heavy}\n" not in shown.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An MLflow server that alone has the artifacts."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    open_store(f"sqlite:///{tmp_path}/server.db", "unused")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "far")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment({}), stdout=log, stderr=log, start_new_session=True
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def test_artifacts_come_through_a_server(server, tmp_path):
    publish(tmp_path / "records", server, [Planted("dpo", {"rsf": rsf(5.0, 1.0)})])
    assert list((tmp_path / "far").rglob("rsf.parquet"))
    assert main(["study", "--outputs", str(tmp_path), "--tracking-uri", server]) == 0
    assert f"from MLflow at {server} ." in Page(tmp_path / "report/study/index.html").text


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_the_page_without_complaint_and_within_its_width(report, tmp_path, width):
    assert BROWSER is not None
    measure = (
        "<script>const page = document.documentElement; document.title = JSON.stringify({"
        "width: page.scrollWidth, window: window.innerWidth, height: page.scrollHeight,"
        "images: [...document.images].filter(one => one.complete && one.naturalWidth > 100).length,"
        "all: document.images.length})</script>"
    )
    page = (report / "index.html").read_text()
    allowing = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "measured.html").write_text(allowing.replace("</body>", f"{measure}</body>"))
    common = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    common += [f"--window-size={width},1000", "--enable-logging=stderr"]
    shown = subprocess.run(
        [*common, "--dump-dom", f"file://{tmp_path}/measured.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    sizes = json.loads(shown.stdout.partition("<title>")[2].partition("</title>")[0])
    assert sizes["images"] == sizes["all"] > 6
    assert sizes["width"] <= sizes["window"] and sizes["height"] > 3000
    picture = tmp_path / "page.png"
    shot = subprocess.run(
        [*common, f"--screenshot={picture}", f"file://{report}/index.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert picture.stat().st_size > 20_000
    assert "CONSOLE" not in shown.stderr + shot.stderr
