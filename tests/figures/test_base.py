from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

from weightgeom.figures.base import COLOURS, expected_and_measured, ratio_by_layer, ratio_by_step, save
from weightgeom.table import row, tabulate

READ, WRITE, LAYERS, STEPS = ("q", "up"), ("o", "down"), (0, 1, 2), (2, 8)


def ratio(step: int, layer: int, matrix: str) -> float:
    return 1 + step / 4 + layer / 10 + 3 * list(COLOURS).index(matrix)


def sd(layer: int, matrix: str) -> float:
    return 0.1 * (layer + 1) * (2 if matrix in ("up", "down") else 1)


def made(steps: tuple[int, ...] = STEPS, layers: tuple[int, ...] = LAYERS):
    """A table such as the probe gives, with further rows of other subspaces and of a larger k."""
    rows = []
    for (step, layer), matrix in product(product(steps, layers), READ + WRITE):
        where = {
            "step": step,
            "layer": layer,
            "matrix": matrix,
            "role": "read" if matrix in READ else "write",
        }
        rows.append(row("delta_norm", 7.0, n=9, **where))
        own = "prediction" if matrix in WRITE else "attention_input" if matrix == "q" else "mlp_input"
        for subspace, k in ((own, 4), (own, 8), ("random", 4), ("random", 8)):
            at = where | {"subspace": subspace, "k": k}
            other = 100.0 if subspace == "random" or k == 8 else 0.0  # must not be drawn
            rows.append(row("ratio", ratio(step, layer, matrix) + other, n=9, **at))
            rows.append(row("null_ratio_mean", 1.0 + other, n=9, **at))
            rows.append(row("null_ratio_sd", sd(layer, matrix) + other, n=9, **at))
    return tabulate(rows)


def matrices(axis: Axes) -> dict[str, Line2D]:
    """The lines of an axis by the matrix they are of."""
    return {str(line.get_label()): line for line in axis.get_lines() if line.get_label() in COLOURS}


def points(line: Line2D) -> tuple[list[float], list[float]]:
    """The coordinates that a line is drawn through."""
    x, y = line.get_data()
    return np.asarray(x, float).tolist(), np.asarray(y, float).tolist()


def bars(axis: Axes) -> dict[str, ErrorbarContainer]:
    """The lines with error bars of an axis by the matrix they are of."""
    return {str(bar.get_label()): bar for bar in axis.containers if isinstance(bar, ErrorbarContainer)}


def chance(axis: Axes) -> list[Line2D]:
    """Dashed grey lines across the axis at 1."""
    return [line for line in axis.get_lines() if points(line)[1] == [1, 1] and line.get_linestyle() == "--"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_ratio_by_layer_has_a_line_for_every_matrix_with_its_ratios():
    axes = ratio_by_layer(made(), step=8).axes
    assert [set(matrices(axis)) for axis in axes] == [set(READ), set(WRITE)]
    for axis in axes:
        for matrix, line in matrices(axis).items():
            assert points(line) == (list(LAYERS), [ratio(8, layer, matrix) for layer in LAYERS])
            assert line.get_color() == COLOURS[matrix]


def test_ratio_by_layer_shows_chance_and_the_widest_null_of_the_panel():
    for axis in ratio_by_layer(made(), step=2).axes:
        (line,) = chance(axis)
        assert to_hex(line.get_color()) == "#808080"
        (band,) = axis.collections
        assert band.get_label() == "null ± 2 sd"
        edges = {(x, y) for x, y in np.round(np.asarray(band.get_paths()[0].vertices), 9).tolist()}
        # of up and down, whose sd is the larger one: 0.2 (layer + 1), so 1 ± 0.4 (layer + 1)
        for layer in LAYERS:
            for sign in (-1, 1):
                assert (layer, round(1 + sign * 0.4 * (layer + 1), 9)) in edges


def test_ratio_by_layer_names_quantity_unit_and_pathway():
    left, right = ratio_by_layer(made(), step=8).axes
    assert left.get_ylabel() == "relative subspace fraction (1)"
    assert left.get_xlabel() == "layer (read pathway)" and right.get_xlabel() == "layer (write pathway)"
    assert left.get_ylim()[0] == 0
    assert all(axis.get_legend() is not None for axis in (left, right))


def test_ratio_by_step_has_a_line_for_every_matrix_with_its_mean_over_layers():
    figure = ratio_by_step({"pretraining": made(), "alignment": made((1, 4, 16))})
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "optimizer step (pretraining)",
        "optimizer step (alignment)",
    ]
    for axis, steps in zip(figure.axes, (STEPS, (1, 4, 16)), strict=True):
        assert set(bars(axis)) == {*READ, *WRITE} and len(chance(axis)) == 1
        for matrix, bar in bars(axis).items():
            line, _, (segments,) = bar.lines
            assert isinstance(line, Line2D)
            ratios = np.array([[ratio(step, layer, matrix) for layer in LAYERS] for step in steps])
            assert points(line)[0] == list(steps)
            np.testing.assert_allclose(points(line)[1], ratios.mean(1))
            # s.d. over three layers, with n - 1
            error = ratios.std(1, ddof=1)
            np.testing.assert_allclose(
                [np.ptp(segment[:, 1]) for segment in segments.get_segments()], 2 * error
            )
            assert line.get_linestyle() == ("-" if matrix in READ else "--")
            assert line.get_color() == COLOURS[matrix]


def test_a_single_layer_has_a_bar_of_length_0():
    (axis,) = ratio_by_step({"one": made(layers=(0,))}).axes
    for bar in bars(axis).values():
        assert all(np.ptp(segment[:, 1]) == 0 for segment in bar.lines[2][0].get_segments())


@pytest.mark.parametrize(
    "draw", [lambda table: ratio_by_layer(table, 0), lambda table: ratio_by_step({"a": table})]
)
def test_where_nothing_moved_there_is_chance_alone(draw, tmp_path):
    rows = [
        row("delta_norm", 0.0, n=1, step=0, layer=0, matrix=matrix, role=role)
        for matrix, role in (("q", "read"), ("o", "write"))
    ]
    figure = draw(tabulate(rows))
    for axis in figure.axes:
        assert len(chance(axis)) == 1 and not matrices(axis)
    save(figure, tmp_path / "empty.png")  # and draws without a warning


@pytest.mark.slow
def test_a_figure_is_saved_as_png_and_pdf_with_the_same_bytes_twice(tmp_path):
    table = made()
    draws = (
        lambda: ratio_by_layer(table, 8),
        lambda: ratio_by_step({"one": table}),
        lambda: expected_and_measured(mechanism()),
    )
    for draw in draws:
        paths = [[tmp_path / f"{run}.{kind}" for kind in ("png", "pdf")] for run in range(2)]
        for png, pdf in paths:
            save(draw(), png, pdf)
        (png, pdf), (other_png, other_pdf) = paths
        assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"
        assert png.read_bytes() == other_png.read_bytes() and pdf.read_bytes() == other_pdf.read_bytes()
        # TrueType (type 2 CID in PDF's words), not the outlines of type 3: the text stays text.
        assert b"/Type3" not in pdf.read_bytes()


def test_saving_closes_the_figure_and_drawing_leaves_the_style_of_others_alone(tmp_path):
    before = mpl.rcParams["font.size"]
    save(ratio_by_layer(made(), 8), tmp_path / "a.png")
    assert plt.get_fignums() == [] and mpl.rcParams["font.size"] == before


EXPECTED = ("predicted", "forecast")


def place(layer: int, matrix: str, shift: float = 0.0) -> dict[str, float]:
    """Where the point of a matrix lies: what is predicted, forecast and measured."""
    at = layer + len(READ + WRITE) * (READ + WRITE).index(matrix) / 8 + shift
    return {"predicted": 1 + at, "forecast": 2 + at / 2, "measured": 1.5 + at / 4}


def mechanism(
    last: int = 8, k: int = 4, shift: float = 0.0, stderr: float | None = 0.25, optimizer: str = ""
):
    """A table such as the probe `moments` gives, with further rows of an earlier step and a larger k.

    With an optimizer, it is the forecast named after Adam that belongs to it, and another is of no optimizer.
    """
    rows = []
    for step, layer, matrix in product((2, last), LAYERS, READ + WRITE):
        role, own = ("read", "mlp_input") if matrix in READ else ("write", "prediction")
        for dimension in (k, 2 * k):
            at: dict[str, Any] = {"step": step, "layer": layer, "matrix": matrix, "role": role}
            at |= {"subspace": own, "k": dimension}
            other = 100.0 if dimension != k or step != last else 0.0  # must not be drawn
            if optimizer:
                rows.append(row("forecast_ratio", 70.0, n=9, **at))  # must not be drawn
            for name, value in place(layer, matrix, shift).items():
                error = None if name == "measured" else stderr
                if optimizer and name != "predicted":
                    at["treatment"] = optimizer
                    name = name.replace("forecast", "forecast_adam")
                rows.append(row(f"{name}_ratio", value + other, n=9, stderr=error, **at))
                rows.append(row(f"{name}_ratio_low", value + 50, n=9, **at))
        rows.append(row("read_predicted_correlation", 0.5, n=9, step=step, role="read", k=k))
    return tabulate(rows)


def drawn(bar: ErrorbarContainer) -> tuple[list[float], list[float], list[float]]:
    """Coordinates of the points of a bar container, and the lengths of their horizontal bars."""
    line, _, (segments,) = bar.lines
    assert isinstance(line, Line2D)
    return *points(line), [float(np.ptp(segment[:, 0])) for segment in segments.get_segments()]


@pytest.mark.parametrize("stderr", [0.25, None])
def test_expected_and_measured_has_a_point_for_every_matrix_where_the_table_says(stderr: float | None):
    axes = expected_and_measured(mechanism(stderr=stderr)).axes
    for axis, name in zip(axes, EXPECTED, strict=True):
        assert set(bars(axis)) == {*READ, *WRITE}
        for matrix, bar in bars(axis).items():
            expected = [place(layer, matrix) for layer in LAYERS]
            x, y, lengths = drawn(bar)
            assert x == [row[name] for row in expected] and y == [row["measured"] for row in expected]
            np.testing.assert_allclose(lengths, 2 * (stderr or 0.0))  # ± a standard error; none is 0
            line = bar.lines[0]
            assert isinstance(line, Line2D)
            assert line.get_marker() == ("o" if matrix in READ else "s") and line.get_linestyle() == "None"
            assert line.get_color() == COLOURS[matrix]


def test_the_identity_of_expected_and_measured_is_dashed_grey_and_as_long_as_the_points_reach():
    axes = expected_and_measured(mechanism()).axes
    top = max(max(place(layer, matrix).values()) for layer in LAYERS for matrix in READ + WRITE)
    for axis in axes:
        (line,) = [drawn for drawn in axis.get_lines() if drawn.get_linestyle() == "--"]
        x, y = points(line)
        assert x == y and x[0] == 0 and x[1] >= top
        assert to_hex(line.get_color()) == "#808080"
        assert axis.get_aspect() == 1


def test_expected_and_measured_names_quantity_and_unit():
    left, right = expected_and_measured(mechanism()).axes
    assert left.get_xlabel() == "predicted relative subspace fraction (1)"
    assert right.get_xlabel() == "forecast relative subspace fraction (1)"
    assert left.get_ylabel() == "measured (1)"
    assert all(axis.get_legend() is not None for axis in (left, right))


@pytest.mark.parametrize("optimizer", ["", "lion"])
def test_the_forecast_is_the_one_that_belongs_to_the_optimizer_and_the_axis_names_it(optimizer: str):
    _, right = expected_and_measured(mechanism(optimizer=optimizer)).axes
    name = "forecast_adam (lion)" if optimizer else "forecast"
    assert right.get_xlabel() == f"{name} relative subspace fraction (1)"
    for matrix, bar in bars(right).items():
        assert drawn(bar)[0] == [place(layer, matrix)["forecast"] for layer in LAYERS]


def test_runs_of_several_optimizers_have_each_their_own_forecast():
    runs = {"a": mechanism(optimizer="adamw"), "b": mechanism(shift=0.5)}
    table = pd.concat([part.assign(run=name) for name, part in runs.items()], ignore_index=True)
    _, right = expected_and_measured(table).axes
    assert right.get_xlabel() == "forecast_adam (adamw),\nforecast relative subspace fraction (1)"
    for matrix, bar in bars(right).items():
        places = [place(layer, matrix, shift)["forecast"] for shift in (0.0, 0.5) for layer in LAYERS]
        assert sorted(drawn(bar)[0]) == sorted(places)


def test_an_optimizer_without_a_forecast_has_no_points_of_one():
    table = mechanism()
    table.loc[table["quantity"] == "measured_ratio", "treatment"] = "muon"
    left, right = expected_and_measured(table).axes
    assert bars(left) and not bars(right)


def test_points_of_all_runs_are_drawn_each_at_its_own_last_step_and_smallest_k():
    runs = {"a": mechanism(), "b": mechanism(last=16, k=6, shift=0.5)}
    table = pd.concat([part.assign(run=name) for name, part in runs.items()], ignore_index=True)
    for axis, name in zip(expected_and_measured(table).axes, EXPECTED, strict=True):
        for matrix, bar in bars(axis).items():
            expected = [place(layer, matrix, shift) for shift in (0.0, 0.5) for layer in LAYERS]
            x, y, _ = drawn(bar)
            assert x == [row[name] for row in expected] and y == [row["measured"] for row in expected]


def test_a_matrix_that_did_not_move_has_no_point():
    still = "quantity == 'measured_ratio' and (matrix == 'q' or matrix == 'up' and layer > 0)"
    for axis in expected_and_measured(mechanism().query(f"not ({still})")).axes:
        assert set(bars(axis)) == {"up", *WRITE}
        assert drawn(bars(axis)["up"])[1] == [place(0, "up")["measured"]]


def test_the_figure_over_steps_says_whose_subspaces_were_taken():
    table = made()
    start, each = table.copy(), table.copy()
    start.attrs["at"], each.attrs["at"] = "start", "step"
    figure = ratio_by_step({"training": start, "pretraining": each, "other": table})
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "optimizer step (training; subspaces of the start)",
        "optimizer step (pretraining; subspaces of each step)",
        "optimizer step (other)",
    ]


def test_increments_are_drawn_as_such():
    table = made()
    increments = table.replace({"quantity": {"ratio": "increment_ratio"}})
    figure = ratio_by_step({"training": increments}, "increment_ratio")
    assert figure.axes[0].get_ylabel().startswith("relative subspace fraction of increments (1)")
    assert len(figure.axes[0].containers) == len(ratio_by_step({"training": table}).axes[0].containers) > 0
