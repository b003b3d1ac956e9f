# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from weightgeom.figures.base import COLOURS, save
from weightgeom.figures.causal import (
    dose_response,
    surgery_curve,
    transplants,
    treatment_by_layer,
)
from weightgeom.table import arm_columns, row, tabulate

KL, CE, MARGIN = "kl_from_unedited", "heldout_ce_change", "preference_margin_change"
LAYERS, STRENGTHS, DRAWS = (0, 1, 2), ("0.1", "1"), 5
KINDS = {"k": "activation", "o": "prediction"}


def size(matrix: str, layer: int, dose: str) -> float:
    """The planted effect of a treatment."""
    return float(dose) * (layer + 1) * (10 if matrix == "o" else 1)


def control(matrix: str, layer: int, dose: str, draw: int) -> float:
    """The planted effect of a random control."""
    return size(matrix, layer, dose) * (draw + 1) / 100


def rank1(
    effect: str = KL,
    layers: tuple[int, ...] = LAYERS,
    strengths: tuple[str, ...] = STRENGTHS,
    p: dict[tuple[str, int], float] | None = None,
    sign: float = 1.0,
    bottom: float | None = 1e-3,
) -> pd.DataFrame:
    """A table such as the intervention gives; `p` has the p-values that are not 0.02, by matrix and layer."""
    rows = []
    for (matrix, kind), layer, dose in product(KINDS.items(), layers, strengths):
        at: dict[str, Any] = {"step": 0, "layer": layer, "matrix": matrix, "k": 4, "n": 9}
        own = {"unit": "nats/token", **at}
        value = size(matrix, layer, dose)
        rows.append(row(effect, sign * value, stderr=value / 8, **arm_columns(kind, dose), **own))
        rows.append(row(f"predicted_{effect}", -sign * 2 * value, **arm_columns(kind, dose), **own))
        for draw in range(DRAWS):
            value_of_control = control(matrix, layer, dose, draw)
            rows.append(
                row(effect, value_of_control * (-1) ** draw, **arm_columns("random", dose, draw=draw), **own)
            )
            rows.append(row(effect, value_of_control / 2, **arm_columns("within", dose, draw=draw), **own))
        if bottom is not None:
            rows.append(row(effect, bottom * value, **arm_columns("bottom", dose, draw=0), **own))
        p_value = (p or {}).get((matrix, layer), 0.02) if dose == strengths[-1] else 0.5
        for against, number in (("random", p_value), ("within", 0.7)):
            rows.append(row(f"{effect}_p_value", number, **arm_columns(kind, dose, against=against), **at))
    return tabulate(rows)


def line_of(axis: Axes, label: str) -> Line2D:
    (line,) = [line for line in axis.get_lines() if line.get_label() == label]
    return line


def points(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = line.get_data()
    return np.asarray(x, float).tolist(), np.asarray(y, float).tolist()


def markers(axis: Axes, colour: str) -> tuple[list[float], list[float]]:
    """Layers with a filled and with an open marker of the treatment."""
    filled: dict[bool, list[float]] = {True: [], False: []}
    for line in axis.get_lines():
        if line.get_marker() == "o" and to_hex(line.get_color()) == colour:
            filled[to_hex(to_rgb(line.get_markerfacecolor())) == colour] += points(line)[0]
    return filled[True], filled[False]


def bars(axis: Axes) -> list[tuple[float, float, float]]:
    """Place and ends of every vertical bar of an axis that has a treatment's colour."""
    return [
        (float(ends[0, 0]), float(ends[0, 1]), float(ends[1, 1]))
        for lines in axis.collections
        if lines.get_edgecolor().size and to_hex(lines.get_edgecolor()[0]) in COLOURS.values()
        for ends in lines.get_segments()
    ]


def legend(figure: Figure) -> list[str]:
    (key,) = figure.legends
    return [text.get_text() for text in key.get_texts()]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_treatment_is_drawn_at_the_largest_strength_in_its_matrix_colour_with_its_error():
    figure = treatment_by_layer(rank1())
    assert len(figure.axes) == 2
    for axis, (matrix, kind) in zip(figure.axes, KINDS.items(), strict=True):
        own = line_of(axis, f"{matrix}: {kind}")
        values = [size(matrix, layer, "1") for layer in LAYERS]
        assert points(own) == (list(LAYERS), values) and own.get_color() == COLOURS[matrix]
        wanted = [(layer, value * 7 / 8, value * 9 / 8) for layer, value in zip(LAYERS, values, strict=True)]
        assert bars(axis) == wanted
        assert axis.get_yscale() == "log"


def test_every_control_is_a_grey_point_next_to_its_layer_and_the_median_a_dash():
    for axis, matrix in zip(treatment_by_layer(rank1()).axes, KINDS, strict=True):
        for name, factor in (("random", 1), ("random in the top k", 0.5)):
            own = line_of(axis, name)
            x, y = points(own)
            assert sorted(y) == pytest.approx(
                sorted(
                    factor * control(matrix, layer, "1", draw) for layer in LAYERS for draw in range(DRAWS)
                )
            )
            assert [round(layer) for layer in x] == [layer for layer in LAYERS for _ in range(DRAWS)]
            assert len(set(to_rgb(own.get_color()))) == 1
        (dashes,) = [dashes for dashes in axis.collections if dashes.get_label() == "random, median"]
        medians = [float(segment[0, 1]) for segment in dashes.get_segments()]
        assert medians == pytest.approx([control(matrix, layer, "1", 2) for layer in LAYERS])


def test_markers_are_filled_where_the_p_value_against_random_is_at_most_the_level():
    left, right = treatment_by_layer(rank1(p={("k", 1): 0.13, ("k", 2): 0.05})).axes
    assert markers(left, COLOURS["k"]) == ([0, 2], [1])
    assert markers(right, COLOURS["o"]) == ([0, 1, 2], [])
    assert left.get_xlabel().split("\n")[:2] == ["layer (k, strength 1)", "p > 0.05: layer 1 (0.13)"]
    assert right.get_xlabel().split("\n")[1] == "p ≤ 0.05 in every layer"


@pytest.mark.parametrize(
    ("p", "layers", "words"),
    [
        ({("k", layer): 0.5 for layer in range(3)}, range(3), "p > 0.05 in every layer"),
        ({("k", layer): 0.5 for layer in range(4)}, range(6), "p > 0.05 in 4 of 6 layers"),
        ({("k", 2): 0.25, ("k", 0): 0.5}, range(3), "p > 0.05: layer 0 (0.5), 2 (0.25)"),
    ],
)
def test_the_figure_says_where_the_treatment_does_not_beat_random_controls(
    p: dict[tuple[str, int], float], layers: range, words: str
):
    axis = treatment_by_layer(rank1(layers=tuple(layers), p=p)).axes[0]
    assert axis.get_xlabel().split("\n")[1] == words


def test_the_figure_says_whether_the_bottom_does_least():
    table = rank1()
    assert "bottom does least in every layer" in treatment_by_layer(table).axes[0].get_xlabel()
    more = (table["arm"] == "bottom.0@1") & (table["matrix"] == "k") & (table["layer"] > 0)
    # Medians within the top k are control(draw 2) / 2 = 0.015 of the treatment: the bottom has 0.02.
    table.loc[more, "value"] = 0.02 * (table["layer"][more].astype(float) + 1)
    left, right = treatment_by_layer(table).axes
    assert "bottom does not do least: layer 1, 2" in left.get_xlabel()
    assert "bottom does least in every layer" in right.get_xlabel()


def test_without_bottom_controls_or_p_values_the_figure_claims_nothing_about_them():
    table = rank1(bottom=None)
    axis = treatment_by_layer(table[~table["quantity"].str.endswith("_p_value")]).axes[0]
    assert axis.get_xlabel() == "layer (k, strength 1)\nno p-values"
    assert markers(axis, COLOURS["k"]) == ([], list(LAYERS))
    assert "bottom" not in legend(axis.figure)


def test_controls_far_below_are_drawn_at_the_lower_edge_and_the_figure_says_so(tmp_path):
    figure = treatment_by_layer(rank1(bottom=1e-9))
    for axis in figure.axes:
        edge = axis.get_ylim()[0]
        assert all(edge <= value <= 1.5 * edge for value in points(line_of(axis, "bottom"))[1])
        assert axis.get_xlabel().endswith("\npoints at the lower edge lie below it")
    assert "edge" not in treatment_by_layer(rank1(bottom=0.005)).axes[0].get_xlabel()
    save(figure, tmp_path / "a.png")


def test_a_change_is_drawn_in_absolute_size_and_called_so():
    figure = treatment_by_layer(rank1(CE, sign=-1), CE)
    axis = figure.axes[0]
    assert points(line_of(axis, "k: activation"))[1] == [size("k", layer, "1") for layer in LAYERS]
    assert axis.get_ylabel() == "absolute change of\nheld-out cross-entropy (nats/token)"
    assert treatment_by_layer(rank1()).axes[0].get_ylabel() == "KL from\nthe unedited model (nats/token)"


def test_effects_of_zero_leave_a_linear_axis(tmp_path):
    table = rank1(CE)
    table.loc[table["quantity"].isin([CE, f"predicted_{CE}"]), "value"] = 0.0
    for figure in (treatment_by_layer(table, CE), dose_response(table, CE)):
        assert all(axis.get_yscale() == "linear" for axis in figure.axes)
        save(figure, tmp_path / "zero.png")  # and draws without a warning
    of_control = (table["arm"] == "random.1@1") & (table["quantity"] == CE)
    table.loc[of_control, "value"] = 0.5
    figure = treatment_by_layer(table, CE)
    assert all(axis.get_yscale() == "log" for axis in figure.axes)
    save(figure, tmp_path / "zero.png")


@pytest.mark.parametrize(("layers", "strengths"), [((3,), STRENGTHS), (LAYERS, ("0.1",)), ((3,), ("0.1",))])
def test_one_layer_and_one_strength_can_be_drawn(
    layers: tuple[int, ...], strengths: tuple[str, ...], tmp_path
):
    table = rank1(CE, layers, strengths)
    by_layer, by_dose = treatment_by_layer(table, CE), dose_response(table, CE)
    for figure in (by_layer, by_dose):
        save(figure, tmp_path / "one.png", tmp_path / "one.pdf")
    ticks = [tick for tick in by_layer.axes[0].get_xticks() if tick in range(-1, 9)]
    assert set(layers) <= set(ticks) and all(float(tick).is_integer() for tick in ticks)
    assert by_dose.axes[0].get_xticks().tolist() == [float(strength) for strength in strengths]


def test_dose_response_has_means_over_layers_of_absolute_effects_with_their_error():
    for axis, (matrix, kind) in zip(dose_response(rank1(CE, sign=-1)).axes, KINDS.items(), strict=True):
        strengths = [float(strength) for strength in STRENGTHS]
        means = [size(matrix, 1, dose) for dose in STRENGTHS]  # effects grow linearly over layers 0 1 2
        x, y = points(line_of(axis, f"{matrix}: {kind}"))
        assert x == strengths and y == pytest.approx(means)
        np.testing.assert_allclose(
            bars(axis), [(at, mean * 7 / 8, mean * 9 / 8) for at, mean in zip(x, means, strict=True)]
        )
        (dashed,) = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
        assert points(dashed)[1] == pytest.approx([2 * mean for mean in means])
        assert axis.get_xscale() == axis.get_yscale() == "log"
        assert sum(line.get_linewidth() == 0.6 for line in axis.get_lines()) == len(LAYERS)


def test_the_band_of_dose_response_is_the_central_90_percent_of_the_draws_and_its_line_the_median():
    (axis, _) = dose_response(rank1(CE)).axes
    middle = line_of(axis, "random, median")
    # Draws are 1 to 5 % of the treatment's mean, 0.2 and 2: median 3 %, quantiles 1.2 % and 4.8 %.
    assert points(middle)[1] == pytest.approx([0.03 * 0.2, 0.03 * 2]) and middle.get_color() == "0.5"
    (band,) = [band for band in axis.collections if band.get_label() == "random, central 90 %"]
    edges = {(x, y) for x, y in np.round(np.asarray(band.get_paths()[0].vertices), 9).tolist()}
    assert {(0.1, 0.0024), (0.1, 0.0096), (1, 0.024), (1, 0.096)} <= edges


def test_an_effect_without_prediction_has_no_dashed_line():
    table = rank1()
    figure = dose_response(table[~table["quantity"].str.startswith("predicted")], KL)
    assert not any(line.get_linestyle() == "--" for axis in figure.axes for line in axis.get_lines())
    assert "first-order prediction" not in legend(figure)


def test_panels_are_two_in_a_line_and_as_many_as_matrices():
    table = rank1()
    figure = treatment_by_layer(
        pd.concat([table, table[table["matrix"] == "k"].assign(matrix="v")], ignore_index=True)
    )
    assert len(figure.axes) == 3
    assert [axis.get_xlabel()[:8] for axis in figure.axes] == ["layer (k", "layer (v", "layer (o"]
    assert [bool(axis.get_ylabel()) for axis in figure.axes] == [True, False, True]
    assert len(treatment_by_layer(table[table["matrix"] == "o"]).axes) == 1


@pytest.mark.parametrize("draw", [treatment_by_layer, dose_response])
def test_an_effect_that_the_table_lacks_is_refused(draw):
    with pytest.raises(KeyError, match=r"no effect 'loss' in the table; it has \['kl_from"):
        draw(rank1(), "loss")


def test_a_treatment_called_random_is_not_taken_for_a_control():
    table = rank1()
    table["treatment"] = table["treatment"].replace("activation", "random")
    axis = treatment_by_layer(table).axes[0]
    assert points(line_of(axis, "k: random"))[1] == [size("k", layer, "1") for layer in LAYERS]
    assert len(points(line_of(axis, "random"))[0]) == len(LAYERS) * DRAWS


DIMENSIONS = (1, 4, 16)


def margin(role: str, dose: str, k: int) -> float:
    return -(1.0 if role == "read" else 2.0) * (k if dose == "remove" else 16 - k)


GROUPS = (("", "read"), ("", "write"), ("k", "read"), ("k+v", "read"))


def surgery(doses: tuple[str, ...] = ("remove", "keep"), groups: tuple[tuple[str, str], ...] = GROUPS):
    """A table such as the intervention gives, with further rows of other effects."""
    rows = []
    for dose, (matrix, role), k in product(doses, groups, DIMENSIONS):
        at: dict[str, Any] = {"step": 8, "role": role, "k": k, "matrix": matrix, "n": 9, "unit": "nats/pair"}
        value = margin(role, dose, k) + len(matrix)
        rows.append(row(MARGIN, value, stderr=0.5, **arm_columns("top", dose), **at))
        rows.append(row(CE, 50.0, **arm_columns("top", dose), **at))
        for draw, shift in enumerate((0.25, 0.5, 1.5)):
            rows.append(row(MARGIN, value + shift, **arm_columns("random_k", dose, draw=draw), **at))
            if dose == "remove":
                rows.append(
                    row(MARGIN, value + 2 * shift, **arm_columns("random_energy", dose, draw=draw), **at)
                )
        at["unit"] = "1"
        rows.append(row(f"{MARGIN}_p_value", 0.25, **arm_columns("top", dose, against="random_k"), **at))
    return tabulate(rows)


def test_surgery_has_a_panel_for_every_group_and_dose_with_the_treatment_in_its_colour():
    figure = surgery_curve(surgery())
    colours = [COLOURS[kind] for kind in ("q", "o", "k", "q")]
    places = product(zip(GROUPS, colours, strict=True), ("remove", "keep"))
    for axis, (((matrix, role), colour), dose) in zip(figure.axes, places, strict=True):
        own = line_of(axis, f"{matrix or role}: top directions")
        values = [margin(role, dose, k) + len(matrix) for k in DIMENSIONS]
        assert points(own) == (list(DIMENSIONS), values) and own.get_color() == colour
        assert bars(axis) == [
            (k, value - 0.5, value + 0.5) for k, value in zip(DIMENSIONS, values, strict=True)
        ]
        unedited = line_of(axis, "unedited model")
        assert points(unedited)[1] == [0, 0] and to_hex(unedited.get_color()) == "#808080"
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == [
        f"margin change (nats/pair)\n{name}" for name in ("read pathway", "write pathway", "k", "k+v")
    ]
    labels = [axis.get_xlabel() for axis in figure.axes[-2:]]
    assert labels == ["dimensions k removed", "dimensions k kept alone"]


def test_controls_of_surgery_are_the_mean_and_range_of_their_draws():
    axis = surgery_curve(surgery(("remove",), (("", "read"),))).axes[0]
    for name, factor in (("random, same k", 1), ("random, same energy", 2)):
        # Shifts 0.25, 0.5, 1.5 have the mean 0.75.
        own, values = line_of(axis, name), [margin("read", "remove", k) for k in DIMENSIONS]
        x, y = points(own)
        assert y == [value + 0.75 * factor for value in values]
        np.testing.assert_allclose(x, DIMENSIONS, rtol=0.1)
        (ends,) = [
            collection.get_segments()
            for collection in axis.collections
            if to_hex(collection.get_edgecolor()[0]) == to_hex(own.get_color())
        ]
        assert [segment[:, 1].tolist() for segment in ends] == [
            [value + 0.25 * factor, value + 1.5 * factor] for value in values
        ]


def test_what_a_surgery_table_lacks_is_left_out_of_its_figure(tmp_path):
    figure = surgery_curve(surgery(("keep",), (("", "write"),)))
    assert len(figure.axes) == 1
    assert legend(figure) == ["write: top directions", "unedited model", "random, same k"]
    save(figure, tmp_path / "one.png")


PARTS = [  # kind, matrix, role, effect, p-value
    ("weights", "", "", 7.0, 0.05),
    ("delta", "", "", 6.0, 0.3),
    ("delta", "", "read", 5.0, 0.05),
    ("delta", "", "write", 4.0, 0.05),
    ("delta", "q", "read", 3.0, 0.3),
    ("delta", "down", "write", 2.0, 0.05),
]


def transplanted(p: bool = True) -> pd.DataFrame:
    rows = []
    for kind, matrix, role, value, p_value in PARTS:
        at: dict[str, Any] = {"step": 8, "role": role, "matrix": matrix, "n": 9}
        own = {"unit": "nats/pair", "stderr": 0.5, **at}
        dose = "replace" if kind == "weights" else "transplant"
        rows.append(row(MARGIN, value, **arm_columns(kind, dose), **own))
        rows += [
            row(MARGIN, (value + draw) / 10, **arm_columns("rotated", dose, draw=draw), **own)
            for draw in range(DRAWS)
        ]
        if p:
            rows.append(row(f"{MARGIN}_p_value", p_value, **arm_columns(kind, dose, against="rotated"), **at))
    return tabulate(rows)


def test_transplants_are_listed_from_all_weights_to_single_kinds_with_margin_and_error():
    axis = transplants(pd.concat([transplanted(), surgery()], ignore_index=True)).axes[0]
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert labels == ["all weights", "all matrices", "read pathway", "write pathway", "q", "down"]
    dots = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert [points(line) for line in dots] == [([part[3]], [at]) for at, part in enumerate(PARTS)]
    filled = [to_hex(line.get_markerfacecolor()) != "#ffffff" for line in dots]
    assert filled == [True, False, True, True, False, True]
    colours = [COLOURS["q"], COLOURS["o"], COLOURS["q"], COLOURS["down"]]
    assert [to_hex(line.get_color()) for line in dots[2:]] == colours
    lengths = [np.ptp(collection.get_segments()[0][:, 0]) for collection in axis.collections]
    assert lengths == [1.0] * len(PARTS)  # ± 0.5


def test_the_rest_of_the_weights_stands_behind_the_pathways_and_the_interaction_last_without_controls():
    at: dict[str, Any] = {"step": 8, "unit": "nats/pair", "stderr": 0.5, "n": 9}
    rest = row(MARGIN, 0.7, **arm_columns("rest", "replace"), matrix="rest", **at)
    left = row(f"{MARGIN}_interaction", -0.2, **arm_columns("weights", "replace"), **at)
    axis = transplants(pd.concat([transplanted(), tabulate([rest, left])], ignore_index=True)).axes[0]
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    pathways = ["read pathway", "write pathway"]
    parts = ["all weights", "all matrices", *pathways, "rest of the weights", "q", "down", "interaction"]
    assert labels == parts
    (diamond,) = [line for line in axis.get_lines() if line.get_marker() == "D"]
    assert points(diamond) == ([-0.2], [parts.index("interaction")])


def test_rotated_controls_are_grey_points_next_to_their_own_transplant_and_the_base_a_dashed_line():
    figure = transplants(transplanted())
    axis = figure.axes[0]
    rotated = [line for line in axis.get_lines() if line.get_label() == "rotated"]
    for place, (line, part) in enumerate(zip(rotated, PARTS, strict=True)):
        x, y = points(line)
        assert x == [(part[3] + draw) / 10 for draw in range(DRAWS)]
        assert all(place < at < place + 0.5 for at in y)
    assert points(line_of(axis, "base"))[0] == [0, 0]
    assert axis.get_xlabel().endswith("(nats/pair)")
    assert legend(figure).count("rotated") == 1


def test_transplants_without_p_values_have_open_markers():
    axis = transplants(transplanted(p=False)).axes[0]
    dots = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert all(to_hex(line.get_markerfacecolor()) == "#ffffff" for line in dots)


@pytest.mark.parametrize(
    ("draw", "other", "words"),
    [
        (surgery_curve, transplanted, r"with the doses \['remove', 'keep', 'scale'\] in"),
        (transplants, surgery, "no rows of preference_margin_change with the dose transplant"),
    ],
)
def test_a_table_without_the_rows_of_a_figure_is_refused(draw, other, words: str):
    with pytest.raises(ValueError, match=words):
        draw(other())
