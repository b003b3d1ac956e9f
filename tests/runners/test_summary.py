import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from rich import get_console

from runners.record import Record
from runners.summary import draw, log_table, own, print_summary
from weightgeom.table import row, tabulate


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record.create(
        tmp_path / "record",
        experiment="e",
        name="n",
        params={},
        tags={},
        inputs=[],
        tracking_uri="sqlite:////tmp/none.db",
    )


def measured(step: int, layer: int, matrix: str, ratio: float, sd: float, k: int = 4) -> list[dict]:
    role = "write" if matrix in ("o", "down") else "read"
    space = "prediction" if role == "write" else "attention_input"
    at = {"step": step, "layer": layer, "matrix": matrix, "role": role, "k": k}
    return [
        row("ratio", ratio, n=64, subspace=space, **at),
        row("ratio", 1.0, n=64, subspace="random", **at),  # a control: in no curve
        row("null_ratio_sd", sd, n=64, subspace=space, **at),
        row("null_ratio_sd", 9.0, n=64, subspace="random", **at),
    ]


@pytest.fixture
def rsf() -> pd.DataFrame:
    rows: list[dict] = []
    for step, ratios in {1: (1.0, 3.0), 2: (2.0, 5.0)}.items():
        for layer, ratio in enumerate(ratios):
            rows += measured(step, layer, "q", ratio, sd=0.3 + 0.1 * layer)
            rows += measured(step, layer, "q", 100.0, sd=9.0, k=8)  # a larger k: not in the curves
    rows += measured(1, 0, "down", 0.5, sd=0.0) + measured(2, 0, "down", 0.75, sd=0.0)
    return tabulate(rows)


def logged(record: Record) -> dict[tuple[str, int], float]:
    points = [point for found, _ in record.batches(0, 100) for point in found]
    assert len({(point.key, point.step) for point in points}) == len(points)
    return {(point.key, point.step): point.value for point in points}


def test_own_rows_are_at_the_matrices_subspaces_and_the_smallest_k(rsf: pd.DataFrame) -> None:
    rows = own(rsf, "ratio")
    assert sorted(rows["value"]) == [0.5, 0.75, 1.0, 2.0, 3.0, 5.0]


def test_the_curves_are_the_mean_over_layers_by_step_and_the_layers_at_the_last_step(
    record: Record, rsf: pd.DataFrame
) -> None:
    log_table(record, "rsf", "", rsf, "ratio")
    assert logged(record) == {
        ("rsf/q", 1): 2.0,  # (1 + 3) / 2
        ("rsf/q", 2): 3.5,  # (2 + 5) / 2
        ("rsf/down", 1): 0.5,
        ("rsf/down", 2): 0.75,
        ("rsf_by_layer/q", 0): 2.0,
        ("rsf_by_layer/q", 1): 5.0,
        ("rsf_by_layer/down", 0): 0.75,
    }


def test_the_curves_of_the_pretraining_have_their_own_name_and_no_layers(
    record: Record, rsf: pd.DataFrame
) -> None:
    log_table(record, "rsf", "_pretraining", rsf, "ratio")
    assert {key for key, _ in logged(record)} == {"rsf_pretraining/q", "rsf_pretraining/down"}


def test_what_belongs_to_no_matrix_is_logged_as_it_is(record: Record) -> None:
    losses = {0: 6.5, 4: 6.25}
    table = tabulate(
        {"step": step, **row("heldout_ce", loss, n=9, unit="nats/token")} for step, loss in losses.items()
    )
    log_table(record, "behaviour", "", table, "")
    assert logged(record) == {("behaviour/heldout_ce", 0): 6.5, ("behaviour/heldout_ce", 4): 6.25}


def shown(tables: dict[str, pd.DataFrame], capsys: pytest.CaptureFixture[str]) -> list[str]:
    get_console().width = 120
    print_summary(tables, Path("/out/record"), "sqlite:////out/mlflow.db")
    return capsys.readouterr().out.splitlines()


def cells(lines: Sequence[str], first: str) -> list[str]:
    """The cells of the table row that starts with `first`."""
    (line,) = (line for line in lines if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_terminal_shows_ratio_null_and_distance_of_every_matrix(
    rsf: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown({"rsf": rsf}, capsys)
    # mean ratio (2 + 5)/2 = 3.5; its spread sqrt(0.3² + 0.4²)/2 = 0.25; z = (3.5 - 1)/0.25 = 10
    assert cells(lines, "read") == ["read", "q", "2.00", "3.50", "1 ± 0.25", "10.0"]
    assert cells(lines, "write") == ["write", "down", "0.50", "0.75", "1 ± 0.00", "-"]
    assert "record: /out/record" in lines
    assert "MLflow: mlflow ui --backend-store-uri sqlite:////out/mlflow.db" in lines


def test_the_terminal_shows_the_behaviour_at_the_start_and_the_end_with_its_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"step": step, **row("heldout_ce", loss, n=9, unit="nats/token", stderr=0.015)}
        for step, loss in {0: 6.5, 2: 6.0, 4: 5.25}.items()
    ]
    lines = shown({"behaviour": tabulate(rows)}, capsys)
    assert cells(lines, "heldout_ce") == ["heldout_ce", "6.5 ± 0.015", "5.25 ± 0.015", "nats/token"]


def test_a_server_is_shown_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({}, Path("/out/record"), "https://mlflow.example")
    assert "MLflow: https://mlflow.example" in capsys.readouterr().out


def test_the_figures_are_drawn_as_png_and_pdf_and_named_after_what_they_show(
    record: Record, rsf: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        draw({"rsf": rsf, "rsf_pretraining": rsf}, record)
    drawn = {path.name for path in (record.directory / "artifacts/figures").iterdir()}
    names = ("ratio_by_step", "ratio_by_layer", "ratio_by_layer_pretraining")
    assert drawn == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}


def test_without_a_table_of_rsf_nothing_is_drawn(record: Record) -> None:
    draw({}, record)
    assert not (record.directory / "artifacts/figures").exists()
