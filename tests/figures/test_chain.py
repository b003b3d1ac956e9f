import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.lines import Line2D

from weightgeom.figures.base import COLOURS
from weightgeom.figures.chain import ratio_by_stage

PAIRS = (("sft", "base"), ("dpo", "base"), ("dpo", "sft"))
MATRICES = {"q": "read", "up": "read", "down": "write"}


def ratio(pair: tuple[str, str], matrix: str) -> float:
    return 1.0 + PAIRS.index(pair) + 10 * list(MATRICES).index(matrix)


@pytest.fixture
def table() -> pd.DataFrame:
    """Means over two layers, 0.5 below and above them; the interval of reads is 0.25 down and 0.75 up."""
    rows = []
    for pair in PAIRS:
        for matrix, role in MATRICES.items():
            mean = ratio(pair, matrix)
            values: list[tuple[str, float, int | None]] = [("ratio", mean - 0.5, 0), ("ratio", mean + 0.5, 1)]
            values += [("ratio", mean, None), ("null_ratio_mean", 1.0, None), ("null_ratio_sd", 0.125, None)]
            if role == "read":
                values += [("ratio_low", mean - 0.25, None), ("ratio_high", mean + 0.75, None)]
            rows += [
                {"stage": pair[0], "against": pair[1], "matrix": matrix, "role": role, "layer": layer,
                 "quantity": quantity, "value": value}
                for quantity, value, layer in values
            ]  # fmt: skip
    return pd.DataFrame(rows).astype({"layer": "Int64"})


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def points(axis: Axes) -> dict[str, list[float]]:
    by_label = {}
    for bar in axis.containers:
        if isinstance(bar, ErrorbarContainer) and isinstance(bar.lines[0], Line2D):
            assert bar.lines[0].get_color() == COLOURS[str(bar.get_label())]
            by_label[str(bar.get_label())] = [float(y) for y in bar.lines[0].get_ydata()]  # pyright: ignore
    return by_label


def test_every_stage_is_drawn_against_the_first_above_and_against_the_one_before_below(table):
    axes = ratio_by_stage(table).axes
    rows = {0: (PAIRS[0], PAIRS[1]), 1: (PAIRS[0], PAIRS[2])}
    for row, pairs in rows.items():
        read, write = axes[2 * row : 2 * row + 2]
        assert points(read) == {matrix: [ratio(pair, matrix) for pair in pairs] for matrix in ("q", "up")}
        assert points(write) == {"down": [ratio(pair, "down") for pair in pairs]}
        for axis in (read, write):
            labels = [label.get_text() for label in axis.get_xticklabels()]
            assert labels == [f"{against} →\n{stage}" for stage, against in pairs]
    assert axes[0].get_xlabel() == "against base (read pathway)"
    assert axes[3].get_xlabel() == "against the stage before (write pathway)"
    assert axes[2].get_ylabel().startswith("relative subspace fraction (1)")


def test_nulls_intervals_layers_and_chance_are_drawn(table):
    read, write, *_ = ratio_by_stage(table).axes
    for axis in (read, write):
        (chance,) = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
        assert list(chance.get_ydata()) == [1, 1]  # pyright: ignore
        bands = [bar for bar in axis.containers if isinstance(bar, BarContainer)]
        ends = {(band.get_y(), band.get_y() + band.get_height()) for bar in bands for band in bar}
        assert ends == {(0.75, 1.25)}
    (bar,) = (bar for bar in read.containers if bar.get_label() == "q")
    (segments,) = (collection.get_segments() for collection in bar.lines[2])  # pyright: ignore
    assert [[float(y) for _, y in segment] for segment in segments] == [[0.75, 1.75], [1.75, 2.75]]
    layers = [
        line for line in read.get_lines() if line.get_color() == COLOURS["q"] and line.get_alpha() == 0.5
    ]
    assert [sorted(line.get_ydata()) for line in layers] == [[0.5, 1.5, 1.5, 2.5]]  # pyright: ignore


def test_a_single_step_has_one_row(table):
    assert len(ratio_by_stage(table[table["stage"] == "sft"]).axes) == 2


def test_a_stage_in_which_nothing_moved_keeps_its_place(table):
    unmoved = table[(table["stage"] != "dpo") | (table["quantity"] == "other")]
    sizes = (
        table[table["stage"] == "dpo"].drop_duplicates(["against", "matrix"]).assign(quantity="delta_norm")
    )
    read, *_ = ratio_by_stage(pd.concat([unmoved, sizes])).axes
    assert points(read) == {matrix: [ratio(PAIRS[0], matrix)] for matrix in ("q", "up")}
    assert len(read.get_xticks()) == 2
