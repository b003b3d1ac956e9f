from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from runners.tracking.record import Record
from weightgeom.analysis.run_record import read_run
from weightgeom.table import ADDED, row, tabulate

ASKED: dict[str, Any] = {
    "experiment": "study",
    "name": "dpo",
    "params": {},
    "tags": {},
    "inputs": [],
    "tracking_uri": "sqlite:///mlflow.db",
}


def recorded(job: Path, **changes: Any) -> Record:
    """A job's record with a table as parquet and CSV, another as CSV alone, and a figure."""
    record = Record.create(job / "record", **(ASKED | changes))
    record.artifact("config.yaml").write_text("seed: 3\nobjective: {beta: 0.1, rate: 1.0e-05}\n")
    table = tabulate([row("ratio", 2.0, n=4, step=1, layer=0, matrix="q")])
    table.to_parquet(record.artifact("tables/rsf.parquet"))
    table.to_csv(record.artifact("tables/rsf.csv"), index=False)
    record.artifact("tables/claims.csv").write_text("claim,agrees\na,yes\n")
    record.artifact("figures/ratio_by_layer.png").write_bytes(b"\x89PNG")
    return record


def test_a_record_is_read_back_from_its_job_or_its_own_directory(tmp_path):
    record = recorded(tmp_path)
    record.end("FINISHED")
    for directory in (tmp_path, str(tmp_path / "record")):
        run = read_run(directory)
        assert run.directory == record.directory and run.status == "FINISHED"
        assert run.config == {"seed": 3, "objective": {"beta": 0.1, "rate": 1e-5}}
        assert list(run.tables) == ["claims", "rsf"] and str(run.tables["rsf"]["layer"].dtype) == "Int64"
        assert run.figures == ["ratio_by_layer"]
        assert run.figure("ratio_by_layer")._repr_png_() == b"\x89PNG"


def test_a_table_of_an_earlier_version_has_todays_columns(tmp_path):
    table = read_run(recorded(tmp_path).directory).tables["rsf"]
    table.drop(columns=list(ADDED)).to_parquet(tmp_path / "record/artifacts/tables/rsf.parquet")
    pd.testing.assert_frame_equal(read_run(tmp_path).tables["rsf"], table)


def test_a_run_that_has_made_nothing_yet_has_no_tables(tmp_path):
    Record.create(tmp_path / "record", **ASKED)
    run = read_run(tmp_path)
    assert (run.status, run.config, run.tables, run.figures) == ("RUNNING", {}, {}, [])
    with pytest.raises(KeyError, match=r"no figure 'ratio' in .*; its figures are none"):
        run.figure("ratio")


def test_a_figure_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    recorded(tmp_path)
    with pytest.raises(KeyError, match=r"no figure 'ratio_by_lyer' in .*; its figures are ratio_by_layer"):
        read_run(tmp_path).figure("ratio_by_lyer")


def test_a_directory_without_a_record_and_a_sweep_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no record of a run in .*: give the directory"):
        read_run(tmp_path)
    Record.create(tmp_path / "record", **ASKED, kind="sweep")
    with pytest.raises(ValueError, match=r"is a sweep: none of its runs has begun"):
        read_run(tmp_path)
    for job in ("1", "0"):
        recorded(tmp_path / job)
    with pytest.raises(ValueError, match=r"is a sweep: give one of its 2 runs, such as .*/0"):
        read_run(tmp_path)
    assert read_run(tmp_path / "0").config["seed"] == 3


@pytest.mark.parametrize("name", ["run.json", "status.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, "\xff"])
def test_a_damaged_record_is_named(name, content, tmp_path):
    recorded(tmp_path)
    (tmp_path / "record" / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"record/{name} is damaged .*: bring it back from a copy"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("config.yaml", text)
            for text in ("", "[]", "a: b: c", "[" * 100_000, "\xff", "!!python/name:os.system")
        ),
        *(("tables/rsf.parquet", text) for text in ("", "PAR1", "a,b")),
        *(("tables/claims.csv", text) for text in ("", "\xff")),
    ],
)
def test_a_damaged_artifact_is_named(name, content, tmp_path):
    recorded(tmp_path)
    path = tmp_path / "record/artifacts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"artifacts/{name} is damaged .*: bring it back from a copy"):
        read_run(tmp_path)
