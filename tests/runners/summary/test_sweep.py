"""The sweep's own table and figure, from the records of its runs."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import json
from pathlib import Path

import pandas as pd
import pytest

from runners.summary.sweep import sharpness_and_ratios, summarise
from runners.tracking.record import Record
from weightgeom.declarations import ProbeDeclaration, recorded
from weightgeom.figures.base import ratio_by_sharpness, save
from weightgeom.table import ADDED, row, tabulate

SHARPNESS = {"graded/dpo": 2.0, "graded/token_hard_16": 5.0, "graded/ce": 9.0}
CORPUS = {"ce": 1.0}


def record(directory: Path, name: str = "run", **params: object) -> Record:
    return Record.create(
        directory / "record",
        experiment="e",
        name=name,
        params=params,
        tags={},
        inputs=[],
        tracking_uri="sqlite:///x.db",
    )


def child(
    directory: Path, objective: str, seed: int, status: str = "FINISHED", on: str | None = None
) -> Path:
    """A run whose write ratio rises with its sharpness and whose read ratio falls; two layers each."""
    params = {"objective.tau": 0.0, "training.steps": 4, "data": "world"} | (
        {"objective.on": on} if on else {}
    )
    made = record(directory, objective=objective, seed=seed, **params)
    sharp = (SHARPNESS | CORPUS)[objective]
    for step, value in ((1, sharp - 1), (2, sharp + 1)):
        made.log({"train/participation_ratio": value, "train/loss": 1 / step}, step)
    rows = []
    for step in (0, 4):
        for layer in (0, 1):
            for matrix, role, subspace, value in (
                ("q", "read", "attention_input", 10 - sharp + seed),
                ("o", "write", "prediction", sharp + seed + layer),
            ):
                place = {"step": step, "layer": layer, "matrix": matrix, "role": role, "subspace": subspace}
                rows.append(row("ratio", value if step else 1.0, n=1, k=4, **place))
    tabulate(rows).to_parquet(made.artifact("tables/rsf.parquet"))
    made.end(status)  # pyright: ignore[reportArgumentType]
    return made.directory


@pytest.fixture
def children(tmp_path) -> list[Path]:
    pairs = [(objective, seed) for objective in SHARPNESS for seed in (0, 1)]
    return [child(tmp_path / str(number), *pair) for number, pair in enumerate(pairs)]


def test_the_table_has_what_each_run_came_to_and_how_the_runs_differ(tmp_path, children):
    parent = record(tmp_path / "parent")
    with (children[0] / "metrics.jsonl").open("a") as file:
        file.write('[]\n{"key": "train/lo')  # damaged, or cut by a kill
    summarise(parent, children)
    table = pd.read_parquet(parent.directory / "artifacts/tables/sweep.parquet")
    assert {*table.columns} == {"run", "objective", "seed", "matrix", "role", "quantity", "value"}
    assert {*table["run"]} == {*SHARPNESS}
    rows = table[(table["run"] == "graded/ce") & (table["seed"] == "1")].set_index(["quantity", "matrix"])
    # The last step's mean over layers 0 and 1: 9 + 1 + (0 + 1) / 2; the last loss; the mean sharpness.
    assert rows["value"].to_dict() == {
        ("ratio", "o"): 10.5,
        ("ratio", "q"): 2.0,
        ("train/loss", ""): 0.5,
        ("train/participation_ratio", ""): 9.0,
    }


def test_a_run_of_an_earlier_version_counts_with_its_whole_matrices(tmp_path):
    run = child(tmp_path / "run", "ce", 0)
    path = run / "artifacts/tables/rsf.parquet"
    table = pd.read_parquet(path)
    head = table[table["matrix"] == "q"].assign(matrix="q.0", value=99.0)
    pd.concat([table, head]).drop(columns=list(ADDED)).to_parquet(path)
    parent = record(tmp_path / "parent")
    summarise(parent, [run])
    rows = pd.read_parquet(parent.directory / "artifacts/tables/sweep.parquet")
    assert set(rows["matrix"]) == {"q", "o", ""} and 99.0 not in set(rows["value"])


def test_the_rank_correlation_of_ratio_and_sharpness_is_logged_and_drawn(tmp_path, children):
    parent = record(tmp_path / "parent")
    corpus = child(tmp_path / "corpus", "ce", 0, on="auto")  # of other data: not ranked with them
    summarise(parent, [*children, corpus])
    logged = {
        point["key"]: point["value"]
        for point in map(json.loads, (parent.directory / "metrics.jsonl").read_text().splitlines())
    }
    # Three objectives in order, whatever their seeds: of 3! = 6 orders, it and its reverse.
    assert logged["graded_control/write_rank_correlation"] == pytest.approx(1)
    assert logged["graded_control/write_p_value"] == pytest.approx(2 / 6)
    assert logged["graded_control/read_rank_correlation"] < -0.7
    for ending in ("png", "pdf"):
        assert (parent.directory / f"artifacts/figures/graded_control.{ending}").stat().st_size > 1000


def test_runs_that_failed_are_left_out_and_counted(tmp_path, children, caplog):
    failed = child(tmp_path / "failed", "graded/ce", 7, status="FAILED")
    parent = record(tmp_path / "parent")
    summarise(parent, [*children, failed, tmp_path / "never started" / "record"])
    table = pd.read_parquet(parent.directory / "artifacts/tables/sweep.parquet")
    assert "7" not in set(table["seed"])
    assert "2 of 8 runs did not finish" in caplog.text


def test_without_sharpness_there_is_a_table_and_no_figure(tmp_path):
    made = record(tmp_path / "0", objective="dpo", seed=0)
    made.log({"train/loss": 0.5}, 1)
    made.end("FINISHED")
    parent = record(tmp_path / "parent")
    summarise(parent, [made.directory])
    assert (parent.directory / "artifacts/tables/sweep.csv").exists()
    assert not (parent.directory / "artifacts/figures").exists()
    nothing = record(tmp_path / "nothing")
    summarise(nothing, [])
    assert not (nothing.directory / "artifacts/tables").exists()


def test_a_point_of_the_figure_is_the_mean_over_the_seeds(tmp_path, children):
    parent = record(tmp_path / "parent")
    summarise(parent, children)
    wide = sharpness_and_ratios(pd.read_parquet(parent.directory / "artifacts/tables/sweep.parquet"))
    assert len(wide) == 12
    figure = ratio_by_sharpness(wide, {"read": (-1.0, 0.01), "write": (1.0, 0.02)})
    write = figure.axes[1]
    points = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in write.lines if len(line.get_xdata()) == 1
    ]
    # Mean over seeds 0 and 1, and over layers: sharpness + 0.5 + 0.5
    assert {(9.0, 10.0), (5.0, 6.0), (2.0, 3.0)} <= {(float(x), float(y)) for x, y in points}
    assert "rank 1.00, p 0.02" in write.get_xlabel()
    save(figure, tmp_path / "figure.png")


def test_headlines_of_other_tables_are_in_the_table_and_drawn(tmp_path, children):
    gaps = tabulate(row("gap", 2.0, n=1, step=4, layer=0, matrix="q", role="read") for _ in "a")
    gaps.attrs["declaration"] = recorded(ProbeDeclaration("gap"))
    for path in children:
        gaps.to_parquet(path / "artifacts/tables/mine.parquet")
    parent = record(tmp_path / "parent")
    summarise(parent, children)
    table = pd.read_parquet(parent.directory / "artifacts/tables/sweep.parquet")
    assert table[table["quantity"] == "mine/gap"]["value"].tolist() == [2.0] * len(children)
    assert (parent.directory / "artifacts/figures/mine_by_run.png").exists()
