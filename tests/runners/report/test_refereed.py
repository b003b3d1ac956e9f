# pandas types the results of indexing as unions of everything they may ever be.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

"""The report's section of published claims, from the verdicts that runs have recorded."""

import re
from io import StringIO

import pandas as pd
import pytest
from rich.console import Console
from study import Planted, publish, rsf

from runners.report.__main__ import main
from runners.summary.terminal import fitting, judged_shown
from weightgeom.analysis.referee import Update, verdicts
from weightgeom.claims.reads_concentrate import ReadsConcentrate
from weightgeom.claims.small_weights import SmallWeights
from weightgeom.claims.writes_near_isotropic import WritesNearIsotropic

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
CLAIMS = [ReadsConcentrate(), WritesNearIsotropic(), SmallWeights()]


def run(write: float, **about) -> Planted:
    table = rsf(5.0, write)
    update = Update("the update", {"rsf": table}, 64, "dpo", "contrast")
    return Planted("dpo", {"rsf": table, "referee": verdicts(CLAIMS, [update])}, **about)


@pytest.mark.slow
def test_every_run_has_a_line_under_each_claim_and_the_table_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = [run(1.1, name="first"), run(4.0, name="<b>second</b>", seed=1)]
    publish(tmp_path / "records", f"sqlite:///{tmp_path}/mlflow.db", runs)
    assert main(["study", "--outputs", str(tmp_path)]) == 0
    page = (tmp_path / "report/study/index.html").read_text()
    section = page[page.index('<section id="referee">') :].partition("</section>")[0]
    assert '<a href="#referee">Published claims</a>' in page
    # In the order of the claims: reads of both runs, writes of either, and rows that nothing measured.
    verdicts = re.findall(r'<td class="(?:\w+)"><strong>([\w ]+)</strong>', section)
    assert verdicts == ["supported", "supported", "supported", "contradicted", *["not testable here"] * 2]
    assert "supported: 1 of 2" in section and "&lt;b&gt;second&lt;/b&gt;: the update (dpo)" in section
    assert '<td class="number">5</td><td class="number">1 ± 0.1</td>' in section
    kept = pd.read_parquet(tmp_path / "report/study/tables/referee.parquet")
    assert list(kept["run_name"].unique()) == ["first", "<b>second</b>"] and len(kept) == 6
    rows = pd.read_parquet(tmp_path / "report/study/tables/rows.parquet")
    assert set(rows["table"]) == {"rsf"}


def test_the_terminal_shows_the_published_number_ours_the_null_and_the_reason():
    shown = judged_shown(verdicts(CLAIMS, [Update("it", {"rsf": rsf(5.0, 4.0)}, 64, "dpo", "contrast")]))
    assert ["ours: 5" in shown["claim"][0], "ours: 4" in shown["claim"][1]] == [True, True]
    assert "published: overlap with the 30 % smallest weights" in shown["claim"][2]
    console = Console(width=80, record=True, file=StringIO())
    for table in fitting(shown, "Published claims", console):
        console.print(table)
    text = " ".join(console.export_text().split())
    assert "arXiv:2606.07082" in text and "not testable here" in text
    assert "'probe=[rsf,sparsity,rotation]'" in text  # brackets are no markup
