from itertools import product

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from weightgeom.figures.base import COLOURS, save
from weightgeom.figures.study import ratio_along_training, ratios_by_setting

WRITES = {"dpo": 1.2, "ce": 3.0, "sft": 2.0}
STEPS = (1, 4, 16)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def means(interval: bool = True) -> pd.DataFrame:
    rows = []
    for setting, role in product(WRITES, ("read", "write")):
        ratio = 5.0 if role == "read" else WRITES[setting]
        ends = {"low": ratio - 0.25, "high": ratio + 0.5} if interval else {"low": None, "high": None}
        rows.append(
            {"setting": setting, "role": role, "ratio": ratio, **ends, "null_mean": 1.0, "null_sd": 0.1}
        )
    return pd.DataFrame(rows).astype({"low": "Float64", "high": "Float64"})


def runs() -> pd.DataFrame:
    table = means()[["setting", "role", "ratio"]]
    return pd.concat([table.assign(ratio=table["ratio"] + shift) for shift in (-0.1, 0.1)])


def along() -> pd.DataFrame:
    rows = [
        {
            "setting": setting,
            "step": step,
            "matrix": matrix,
            "role": role,
            "ratio": step + len(matrix),
            "stderr": 0.5,
        }
        for setting, step, (matrix, role) in product(WRITES, STEPS, (("q", "read"), ("down", "write")))
    ]
    return pd.DataFrame(rows)


def bars(axis: Axes) -> list[ErrorbarContainer]:
    return [bar for bar in axis.containers if isinstance(bar, ErrorbarContainer)]


def line_of(bar: ErrorbarContainer) -> Line2D:
    line = bar.lines[0]
    assert isinstance(line, Line2D)
    return line


@pytest.mark.parametrize("interval", [True, False])
def test_settings_are_in_the_order_of_their_write_ratio_with_their_intervals(interval):
    left, right = ratios_by_setting(means(interval), runs()).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["ce", "sft", "dpo"]
    (bar,) = bars(right)
    places = dict(
        zip(*(np.asarray(values).tolist() for values in line_of(bar).get_data()[::-1]), strict=True)
    )
    assert places == {0: 3.0, 1: 2.0, 2: 1.2}
    lengths = [float(np.ptp(segment[:, 0])) for segment in bar.lines[2][0].get_segments()]
    np.testing.assert_allclose(lengths, 0.75 if interval else 0.0)
    assert line_of(bars(left)[0]).get_color() == COLOURS["q"] and line_of(bar).get_color() == COLOURS["o"]


def test_every_panel_has_the_runs_in_grey_chance_and_the_null():
    for axis, count in zip(ratios_by_setting(means(), runs()).axes, (6, 6), strict=True):
        (single,) = [line for line in axis.get_lines() if line.get_label() == "one run"]
        assert len(np.asarray(single.get_xdata())) == count and single.get_color() == "0.6"
        (chance,) = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
        assert list(np.asarray(chance.get_xdata())) == [1, 1]
        edges = {
            (round(patch.get_x(), 9), round(patch.get_width(), 9))
            for patch in axis.patches
            if isinstance(patch, Rectangle)
        }
        assert edges == {(0.8, 0.4)}  # 1 ± 2 · 0.1
        assert "relative subspace fraction (1)" in axis.get_xlabel()


def test_a_panel_for_every_setting_has_a_line_for_every_matrix_along_the_steps():
    axes = ratio_along_training(along()).axes
    assert [axis.get_xlabel().partition("\n")[2] for axis in axes] == list(WRITES)
    for axis in axes:
        for bar, (matrix, style) in zip(bars(axis), (("q", "-"), ("down", "--")), strict=True):
            assert line_of(bar).get_color() == COLOURS[matrix] and line_of(bar).get_linestyle() == style
            x, y = (np.asarray(values).tolist() for values in line_of(bar).get_data())
            assert x == list(STEPS) and y == [step + len(matrix) for step in STEPS]
            lengths = [float(np.ptp(segment[:, 1])) for segment in bar.lines[2][0].get_segments()]
            assert lengths == [1.0] * len(STEPS)  # ± 0.5
        assert any(line.get_linestyle() == "--" and line.get_color() == "0.5" for line in axis.get_lines())


def test_settings_beyond_three_go_to_a_second_line():
    table = pd.concat([along(), along().replace({"setting": {"dpo": "kto"}}).query("setting == 'kto'")])
    figure = ratio_along_training(table)
    assert len(figure.axes) == 4 and figure.axes[3].get_ylabel().startswith("relative subspace")


def test_they_are_saved_without_a_warning(tmp_path):
    save(ratios_by_setting(means(), runs()), tmp_path / "a.png", tmp_path / "a.pdf")
    save(ratio_along_training(along()), tmp_path / "b.png")
    assert (tmp_path / "a.pdf").read_bytes()[:4] == b"%PDF" and b"/Type3" not in (
        tmp_path / "a.pdf"
    ).read_bytes()
