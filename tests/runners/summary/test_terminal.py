# pyright: reportAssignmentType=false, reportArgumentType=false
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
from rich import get_console
from rich.console import Console

from runners.summary.commands import open_mlflow
from runners.summary.curves import log_table
from runners.summary.figures import draw
from runners.summary.terminal import End, fitting, print_summary
from runners.tracking.record import Record
from weightgeom.declarations import ProbeDeclaration
from weightgeom.interfaces import Probe, Setting
from weightgeom.params import Params
from weightgeom.probes.behaviour import Behaviour
from weightgeom.probes.moments import Moments
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum
from weightgeom.table import Row, own, row, tabulate

PROBES: dict[str, Probe] = {
    "rsf": RSF(),
    "behaviour": Behaviour(),
    "moments": Moments(),
    "spectrum": Spectrum(),
    "overlap": Overlap(),
}


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
        row("null_ratio_mean", 1.0, n=64, subspace=space, **at),
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


def head(step: int, number: int, ratio: float) -> dict:
    where = {"layer": 0, "matrix": "q", "head": number, "role": "read", "subspace": "attention_input", "k": 4}
    return {"step": step, **row("ratio", ratio, n=8, **where)}


@pytest.fixture
def moments() -> pd.DataFrame:
    """Of two layers and one, at two steps, the first with other numbers that are not to be shown."""
    rows: list[dict] = []
    for step, far in ((1, 50.0), (2, 0.0)):
        for layer, matrix, ratios in (
            (0, "q", (2.0, 3.0, 4.0)),
            (1, "q", (3.0, 4.0, 6.0)),
            (0, "down", (0.5, 0.75, 1.25)),
        ):
            role, space = ("read", "attention_input") if matrix == "q" else ("write", "prediction")
            for k in (4, 8):
                where = {"layer": layer, "matrix": matrix, "role": role, "subspace": space, "k": k}
                for name, ratio in zip(("predicted", "forecast", "measured"), ratios, strict=True):
                    value = ratio + far + (0 if k == 4 else 100)
                    rows.append({"step": step, **row(f"{name}_ratio", value, n=64, **where)})
        for name, value in (("predicted", 0.5), ("forecast", 0.875)):
            rows.append({"step": step, **row(f"read_{name}_correlation", value, n=3, role="read", k=4)})
    return tabulate(rows)


def logged(record: Record) -> dict[tuple[str, int], float]:
    points = [point for batch, _ in record.batches(0, 100) for point in batch]
    assert len({(point.key, point.step) for point in points}) == len(points)
    return {(point.key, point.step): point.value for point in points}


def test_own_rows_are_at_the_matrices_subspaces_and_the_smallest_k(rsf: pd.DataFrame) -> None:
    rows = own(rsf, "ratio")
    assert sorted(rows["value"]) == [0.5, 0.75, 1.0, 2.0, 3.0, 5.0]


def test_own_rows_leave_heads_out(rsf: pd.DataFrame) -> None:
    heads = tabulate([head(1, 0, 70.0), head(2, 1, 80.0)])
    both = pd.concat([rsf, heads], ignore_index=True)
    assert sorted(own(both, "ratio")["value"]) == sorted(own(rsf, "ratio")["value"])
    assert not len(own(heads, "ratio"))


def test_the_curves_are_the_mean_over_layers_by_step_and_the_layers_at_the_last_step(
    record: Record, rsf: pd.DataFrame
) -> None:
    log_table(record, "rsf", "", rsf, RSF.declaration)
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
    log_table(record, "rsf", "_pretraining", rsf, RSF.declaration)
    assert {key for key, _ in logged(record)} == {"rsf_pretraining/q", "rsf_pretraining/down"}


@pytest.mark.parametrize(
    ("probe", "suffix", "expected"),
    [
        ("rsf", "", {"rsf/q", "rsf/down", "rsf_by_layer/q", "rsf_by_layer/down"}),
        ("rsf", "_pretraining", {"rsf_pretraining/q", "rsf_pretraining/down"}),
        ("spectrum", "", {"spectrum/q", "spectrum/down"}),
        ("overlap", "", {"overlap/q", "overlap/down"}),
        ("spectrum", "_pretraining", set()),
        ("overlap", "_pretraining", set()),
        ("moments", "_pretraining", set()),
    ],
)
def test_secondary_probes_have_no_layers_and_the_pretraining_has_curves_of_the_main_ones_alone(
    probe: str, suffix: str, expected: set[str], record: Record, rsf: pd.DataFrame
) -> None:
    declaration = replace(PROBES[probe].declaration, headline="ratio")
    log_table(record, probe, suffix, rsf, declaration)
    assert {key for key, _ in logged(record)} == expected


def test_the_mechanism_has_curves_and_correlations(record: Record, moments: pd.DataFrame) -> None:
    log_table(record, "moments", "", moments, Moments().declaration)
    assert logged(record) == {
        ("moments/q", 1): 55.0,  # (54 + 56) / 2
        ("moments/q", 2): 5.0,  # (4 + 6) / 2
        ("moments/down", 1): 51.25,
        ("moments/down", 2): 1.25,
        ("moments/read_predicted_correlation", 1): 0.5,
        ("moments/read_predicted_correlation", 2): 0.5,
        ("moments/read_forecast_correlation", 1): 0.875,
        ("moments/read_forecast_correlation", 2): 0.875,
    }


def test_what_belongs_to_no_matrix_is_logged_as_it_is(record: Record) -> None:
    losses = {0: 6.5, 4: 6.25}
    table = tabulate(
        {"step": step, **row("heldout_ce", loss, n=9, unit="nats/token")} for step, loss in losses.items()
    )
    log_table(record, "behaviour", "", table, Behaviour.declaration)
    assert logged(record) == {("behaviour/heldout_ce", 0): 6.5, ("behaviour/heldout_ce", 4): 6.25}


END = End("read 5.3 times chance", ["half is dropped"], Path("/out/record"), "sqlite:////out/mlflow.db", "go")


def shown(tables: dict[str, pd.DataFrame], capsys: pytest.CaptureFixture[str], width: int = 120) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:  # of the console of all tests
        patch.setattr(get_console(), "_width", width)
        print_summary(tables, PROBES, {}, END)
    return capsys.readouterr().out.splitlines()


def cells(lines: Sequence[str], first: str) -> list[str]:
    """The cells of the table row that starts with `first`."""
    (line,) = (line for line in lines if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_terminal_shows_ratio_null_and_distance_of_every_matrix(
    rsf: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    of_mean = {"step": rsf["step"].max(), "matrix": "q", "role": "read"}
    sds = {4: 0.25, 8: 6.25}
    joint = tabulate({**of_mean, "k": k, **row("ratio_mean_null_sd", sd, n=2)} for k, sd in sds.items())
    whole = {**of_mean, "matrix": "", "k": 4, **row("ratio_mean_z", 9.0, n=2)}  # is in no table of its own
    lines = shown({"rsf": pd.concat([rsf, joint, tabulate([whole])], ignore_index=True)}, capsys)
    # mean ratio (2 + 5)/2 = 3.5; z = (3.5 - 1)/0.25 = 10
    read, larger = (line for line in lines if line.startswith("│ read"))
    assert cells([read], "read") == ["read", "q", "4", "2.00", "3.50", "1 ± 0.25", "10.0"]
    assert cells([larger], "read") == ["read", "q", "8", "100.00", "100.00", "1 ± 6.25", "15.8"]
    assert cells(lines, "write") == ["write", "down", "4", "0.50", "0.75", "1 ± 0.00", "-"]
    assert not any("ratio_mean" in line for line in lines)
    assert "Relative subspace fraction (rsf)" in [line.strip() for line in lines]


def test_without_a_joint_null_the_layers_own_stand_for_it(
    rsf: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    (read, _) = (line for line in shown({"rsf": rsf}, capsys) if line.startswith("│ read"))
    assert cells([read], "read")[-2:] == ["1 ± 0.35", "7.1"]  # the mean of 0.3 and 0.4


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_of_a_table_is_wider_than_the_terminal_and_no_number_is_cut(
    width: int, rsf: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown({"rsf": rsf, "rsf_pretraining": rsf}, capsys, width)
    assert max(map(len, (line for line in lines if line.startswith(("│", "┃", "┏"))))) <= width
    assert sum("100.00" in line for line in lines) == 2 and not any("…" in line for line in lines)


def test_the_end_says_the_answer_the_warnings_and_where_to_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown({}, capsys, 80) == [
        "answer: read 5.3 times chance",
        "warning: half is dropped",
        "record: /out/record",
        f"MLflow: {' '.join(open_mlflow(END.tracking_uri, None)[:1])}",
        "then open: http://127.0.0.1:5000",
        "next: go",
    ]


def test_a_table_that_is_too_wide_goes_on_below_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    wide = pd.DataFrame([{"stage": "sft", **{f"quantity {n}": "1.25 (10.0)" for n in range(8)}}])
    parts = list(fitting(wide, "stages", Console(width=80)))
    heads = [[str(column.header) for column in part.columns] for part in parts]
    assert [head[0] for head in heads] == ["stage"] * len(parts) and len(parts) == 2
    assert [name for head in heads for name in head[1:]] == [f"quantity {n}" for n in range(8)]
    assert [str(part.title) for part in parts] == ["stages", "stages, continued"]


def test_a_table_that_is_nearly_too_wide_breaks_its_heads_and_no_words_or_numbers() -> None:
    null = "0.0577 ± 0.000891"
    row_of = {"pathway": "read", "matrix": "up", "invisible share at step 0": 1, "null": null, "z": -4.0}
    short = pd.DataFrame([row_of])
    console = Console(width=60, record=True, file=StringIO())
    (table,) = fitting(short, "sparsity", console)
    console.print(table)
    lines = console.export_text().splitlines()
    assert cells(lines, "read") == ["read", "up", "1", null, "-4.0"]
    assert max(map(len, lines)) <= 60 and sum("invisible" in line for line in lines) == 1


def test_heads_are_shown_by_their_range(capsys: pytest.CaptureFixture[str]) -> None:
    whole = [row("ratio", 2.0, n=8, layer=0, matrix="q", role="read", subspace="attention_input", k=4)]
    heads = [head(1, number, ratio) for number, ratio in enumerate((1.0, 2.0, 4.5))]
    table = tabulate([*({"step": 1, **row} for row in whole), *heads])
    lines = shown({"rsf": table}, capsys, 80)
    (line,) = (line for line in lines if "heads" in line)
    assert cells([line], "read") == ["read", "q", "3 heads", "1.00", "2.00", "4.50", "layer 0, head 2"]


def test_a_pair_has_one_column_of_its_one_step(rsf: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown({"rsf": rsf[(rsf["step"] == 1) & (rsf["k"] == 4)]}, capsys, 80)
    (head_line,) = (line for line in lines if line.startswith("┃"))
    assert [cell.strip() for cell in head_line.strip("┃").split("┃")] == [
        "pathway", "matrix", "ratio", "null", "z"
    ]  # fmt: skip


def test_two_checkpoints_that_are_equal_have_a_table_of_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    at = {"layer": 0, "matrix": "q", "role": "read"}
    sizes = tabulate({"step": 1, **row(name, 0.0, n=9, **at)} for name in ("delta_norm", "moved_share"))
    lines = shown({"rsf": sizes}, capsys, 80)
    assert cells(lines, "read") == ["read", "q", "0", "0"]
    assert any("nothing moved" in line for line in lines)


def test_the_terminal_shows_the_behaviour_at_the_start_and_the_end_with_its_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"step": step, **row("heldout_ce", loss, n=9, unit="nats/token", stderr=0.015)}
        for step, loss in {0: 6.5, 2: 6.0, 4: 5.25}.items()
    ]
    lines = shown({"behaviour": tabulate(rows)}, capsys)
    assert cells(lines, "heldout_ce") == ["heldout_ce", "6.5 ± 0.015", "5.25 ± 0.015", "nats/token"]


def test_the_terminal_shows_what_was_predicted_forecast_and_measured_at_the_last_step(
    moments: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown({"moments": moments}, capsys)
    pathways = [cells([line], line.split()[1]) for line in lines if line.startswith(("│ read", "│ write"))]
    assert pathways == [
        ["read", "q", "2.50", "3.50", "5.00"],  # means of two layers
        ["write", "down", "0.50", "0.75", "1.25"],
        ["read", "correlation", "0.50", "0.88", "1"],
        ["write", "correlation", "-", "-", "1"],  # of one matrix there is none
    ]


@pytest.mark.parametrize("name", ["rsf", "moments", "behaviour", "spectrum", "overlap"])
def test_a_table_without_rows_is_accepted_and_shows_nothing(
    name: str, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {name + suffix: tabulate([]) for suffix in ("", "_pretraining")}
    for suffix in ("", "_pretraining"):
        log_table(record, name, suffix, tables[name + suffix], PROBES[name].declaration)
    draw(tables, record, PROBES, {})
    assert logged(record) == {} and not (record.directory / "artifacts/figures").exists()
    assert not [line for line in shown(tables, capsys) if line.startswith("│")]


def test_a_server_is_shown_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({}, {}, {}, replace(END, tracking_uri="https://mlflow.example"))
    out = capsys.readouterr().out
    assert "MLflow: https://mlflow.example\n" in out and "then open" not in out


def test_the_figures_are_drawn_as_png_and_pdf_and_named_after_what_they_show(
    record: Record, rsf: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        draw({"rsf": rsf, "rsf_pretraining": rsf}, record, PROBES, {})
    drawn = {path.name for path in (record.directory / "artifacts/figures").iterdir()}
    names = ("ratio_by_step", "ratio_by_layer", "ratio_by_layer_pretraining")
    assert drawn == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}


def test_the_mechanism_is_drawn_with_and_without_the_ratios(
    record: Record, rsf: pd.DataFrame, moments: pd.DataFrame
) -> None:
    draw({"moments": moments, "moments_pretraining": tabulate([])}, record, PROBES, {})
    folder = record.directory / "artifacts/figures"
    assert {path.name for path in folder.iterdir()} == {"mechanism.png", "mechanism.pdf"}
    draw({"rsf": rsf, "moments": moments}, record, PROBES, {})
    names = ("mechanism", "ratio_by_step", "ratio_by_layer")
    assert {path.name for path in folder.iterdir()} == {f"{n}.{end}" for n in names for end in ("png", "pdf")}


def test_without_a_table_of_rsf_nothing_is_drawn(record: Record) -> None:
    draw({}, record, PROBES, {})
    assert not (record.directory / "artifacts/figures").exists()


@dataclass(frozen=True)
class Gap:
    """A probe that brings no figure and no summary."""

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration("gap", label="the gap", of_pretraining=True)

    def check(self, architecture: object) -> None: ...

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        return lambda params: []


@pytest.fixture
def gaps() -> pd.DataFrame:
    """Of two layers, without a subspace, and one number of the whole model."""
    rows: list[dict] = []
    for step, values in {0: (0.0, 0.0), 2: (1.0, 3.0)}.items():
        rows += [
            {"step": step, **row("gap", value, n=9, layer=layer, matrix=matrix, role=role)}
            for matrix, role in (("q", "read"), ("o", "write"))
            for layer, value in enumerate(values)
        ]
        rows.append({"step": step, **row("mean_gap", sum(values) / 2, n=4)})
    return tabulate(rows)


def test_a_probe_that_brings_nothing_is_seen_everywhere(
    record: Record, gaps: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    log_table(record, "mine", "", gaps, Gap.declaration)
    assert logged(record) == {
        ("mine/mean_gap", 0): 0.0, ("mine/mean_gap", 2): 2.0,
        ("mine/q", 0): 0.0, ("mine/q", 2): 2.0, ("mine/o", 0): 0.0, ("mine/o", 2): 2.0,
        ("mine_by_layer/q", 0): 1.0, ("mine_by_layer/q", 1): 3.0,
        ("mine_by_layer/o", 0): 1.0, ("mine_by_layer/o", 1): 3.0,
    }  # fmt: skip
    print_summary({"mine": gaps}, {"mine": Gap()}, {}, END)
    lines = capsys.readouterr().out.splitlines()
    assert cells(lines, "read") == ["read", "q", "0", "2"]
    assert cells(lines, "mean_gap") == ["mean_gap", "0", "2", "1"]
    draw({"mine": gaps}, record, {"mine": Gap()}, {})
    drawn = {path.stem for path in (record.directory / "artifacts/figures").iterdir()}
    assert drawn == {"mine_by_step", "mine_by_layer", "mine_whole"}


def test_a_second_instance_has_figures_and_tables_of_its_own(
    record: Record, rsf: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, probes = {"rsf": rsf, "rsf16": rsf}, {"rsf": RSF(), "rsf16": RSF(k=16)}
    draw(tables, record, probes, {})
    drawn = {path.name for path in (record.directory / "artifacts/figures").glob("*.png")}
    names = ("ratio_by_step", "ratio_by_layer")
    assert drawn == {f"{of}{name}.png" for name in names for of in ("", "rsf16_")}
    print_summary(tables, probes, {}, END)
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert {f"Relative subspace fraction ({name})" for name in probes} <= lines
