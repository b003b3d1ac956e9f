"""Figures of any probe or intervention that brings none, drawn from rows of its tables alone."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Mapping
from math import ceil

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weightgeom.figures.base import COLOURS, PATHWAYS, STYLE

OTHER = "0.35"  # the colour of a matrix of another kind


def by_step(tables: Mapping[str, pd.DataFrame], label: str) -> Figure:
    """A quantity by optimizer step, mean and standard deviation over layers; reads are solid.

    `tables` holds rows of this quantity, one for each step, layer and matrix, by the trajectory's name: a
    panel each.
    """
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(tables), 2.6)
        for axis, (name, rows) in zip(axes, tables.items(), strict=True):
            for (matrix, role), part in rows.groupby(["matrix", "role"], sort=False):
                values = part.groupby("step")["value"]
                axis.errorbar(
                    *(values.mean().index, values.mean(), values.std().fillna(0)),
                    ls="--" if role == "write" else "-",
                    **_look(matrix),
                )
            _steps(axis, name)
        axes[0].set_ylabel(f"{label} ({_unit(*tables.values())})\nmean over layers ± s.d.")
    return figure


def by_layer(rows: pd.DataFrame, null: Mapping[str, pd.DataFrame], label: str) -> Figure:
    """A quantity of every matrix by layer at the last step, a panel a pathway.

    `null` has the rows of the null's `mean` and `sd`, empty where there is none: the grey band is its mean
    ± 2 standard deviations, the widest of the panel's matrices.
    """
    rows = rows[rows["step"] == rows["step"].max()]
    roles = [role for role in (*PATHWAYS, "") if (rows["role"] == role).any()]
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(roles), 2.4)
        for axis, role in zip(axes, roles, strict=True):
            part = rows[rows["role"] == role]
            mean, sd = (_at_end(null[end], part) for end in ("mean", "sd"))
            if len(sd):
                low, high = mean - 2 * sd, mean + 2 * sd
                axis.fill_between(sd.index.astype(int), low, high, color="0.85", lw=0, label="null ± 2 sd")
            for matrix, values in part[part["layer"].notna()].groupby("matrix", sort=False):
                means = values.groupby("layer")["value"].mean()  # over experts
                axis.plot(means.index.astype(int), means, **_look(matrix))
            axis.set_xlabel(f"layer ({PATHWAYS[role]})" if role else "layer")
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            _legend(axis)
        axes[0].set_ylabel(f"{label} ({_unit(rows)})")
    return figure


def by_stage(table: pd.DataFrame, headline: str, label: str) -> Figure:
    """A headline stage by stage, against the first stage and against the one before; a line a matrix.

    A point is the mean over layers. `table` has one probe's rows of the comparison of all stages.
    """
    rows = table[(table["quantity"] == headline) & table["layer"].isna()]
    first = str(table["against"].iloc[0])
    stages = [str(stage) for stage in dict.fromkeys(table["stage"])]
    before = dict(zip(stages, [first, *stages], strict=False))
    panels = {f"against {first}": dict.fromkeys(stages, first)}
    if len(stages) > 1:
        panels["against the stage before"] = before
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(panels), 2.6)
        for axis, (name, against) in zip(axes, panels.items(), strict=True):
            mine = rows[rows["against"] == rows["stage"].map(against)]
            for (matrix, role), part in mine.groupby(["matrix", "role"], sort=False):
                places = [stages.index(stage) for stage in part["stage"]]
                look = _look(matrix) | {"ls": "--" if role == "write" else "-"}
                axis.plot(places, part["value"], **look)
            axis.set_xticks(range(len(stages)), [f"{against[stage]} →\n{stage}" for stage in stages])
            axis.set_xlabel(name)
            _legend(axis)
        axes[0].set_ylabel(f"{label} ({_unit(rows)})\nmean over layers")
    return figure


def whole_by_step(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Every quantity without a matrix by optimizer step, a panel a quantity, a line a trajectory."""
    quantities = dict.fromkeys(name for rows in tables.values() for name in rows["quantity"])
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(quantities), 2.2)
        for axis, quantity in zip(axes, quantities, strict=True):
            parts = {name: rows[rows["quantity"] == quantity] for name, rows in tables.items()}
            for name, part in parts.items():
                values, errors = part.groupby("step")["value"].mean(), part.groupby("step")["stderr"].max()
                error = errors.astype(float).fillna(0) if len(part) == len(values) else None
                axis.errorbar(
                    values.index, values, error, fmt="o-", ms=2.5, lw=1.2, elinewidth=0.7, label=name
                )
            axis.set_ylabel(f"{quantity.replace('_', ' ')} ({_unit(*parts.values())})")
            _steps(axis)
    return figure


def effects(compared: pd.DataFrame, label: str) -> Figure:
    """The effect of every treatment, in colour, and the median of its controls, in grey.

    By layer where there is one, else by the dimension k, else by the dose; a panel a matrix or pathway.
    Filled: p ≤ 0.05 by rank among the controls. `compared` has the columns of
    `weightgeom.analysis.comparisons`, with one kind of control for each treatment.
    """
    groups = list(compared.groupby(["matrix", "role"], sort=False))
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(groups), 2.4)
        for axis, ((matrix, role), part) in zip(axes, groups, strict=True):
            for (treatment, dose, against), rows in part.groupby(
                ["treatment", "dose", "against"], sort=False
            ):
                x, name = _places(rows)
                look = _look(matrix or {"read": "q", "write": "o"}.get(role, ""))
                beats = (rows["p_value"] <= 0.05).to_numpy()
                axis.plot(x, rows["controls"], "x--", ms=3, lw=0.8, color="0.6", label=f"median of {against}")
                axis.plot(x, rows["effect"], lw=look["lw"], color=look["color"])
                for mask, face in ((beats, look["color"]), (~beats, "white")):
                    axis.plot(
                        *([value for value, kept in zip(values, mask, strict=True) if kept]
                          for values in (x, rows["effect"])),
                        "o", ms=4, color=look["color"], mfc=face,
                        label=f"{treatment}@{dose}" if face != "white" or not beats.any() else None,
                    )  # fmt: skip
                axis.set_xlabel(f"{name} ({matrix or role or 'all matrices'})")
                if name != "dose":
                    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            _legend(axis)
        axes[0].set_ylabel(label)
    return figure


def by_setting(means: pd.DataFrame, runs: pd.DataFrame, label: str) -> Figure:
    """A headline after training in every setting of a study: a point the mean over runs, in grey the runs.

    Both have the columns `setting`, `matrix` and `value`, `means` also `low` and `high`, the ends of a 95 %
    interval, where there is one.
    """
    settings = list(dict.fromkeys(means["setting"]))
    matrices = list(dict.fromkeys(means["matrix"]))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.5, 1.2 + 0.4 * len(settings)), layout="constrained")
        for number, matrix in enumerate(matrices):
            beside = 0.7 * ((number + 0.5) / len(matrices) - 0.5)
            mine, single = (table[table["matrix"] == matrix] for table in (means, runs))
            axis.plot(
                single["value"], [settings.index(name) + beside for name in single["setting"]],
                ".", ms=3, color="0.75",
            )  # fmt: skip
            ends = [(mine["value"] - mine["low"]), (mine["high"] - mine["value"])]
            axis.errorbar(
                mine["value"], [settings.index(name) + beside for name in mine["setting"]],
                xerr=[end.astype(float).fillna(0).clip(lower=0) for end in ends],
                fmt="o", ms=3, elinewidth=0.7, color=COLOURS.get(matrix, OTHER),
                label=matrix or "whole model",
            )  # fmt: skip
        axis.set_yticks(range(len(settings)), settings)
        axis.set_ylim(len(settings) - 0.5, -0.5)
        axis.set_xlabel(label)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)
    return figure


def _panels(number: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels, two in a line."""
    across = min(2, number)
    down = ceil(number / across)
    size = (3.25 * across, height * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[number:]:
        axis.remove()
    return figure, list(axes.flat[:number])


def _look(matrix: object) -> dict:
    name = str(matrix)
    colour = COLOURS.get(name.partition(".")[0], OTHER)
    return {"marker": "o", "ms": 2.5, "lw": 1.2, "color": colour, "label": name or "whole model"}


def _steps(axis: Axes, trajectory: str = "") -> None:
    axis.set_xscale("symlog", base=2, linthresh=1)  # step 0 is before training
    axis.set_xlabel(f"optimizer step ({trajectory})" if trajectory else "optimizer step")
    _legend(axis)


def _legend(axis: Axes) -> None:
    """Below the panel, one entry for a name."""
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    if entries:
        place = {"loc": "upper left", "bbox_to_anchor": (0, -0.28), "ncols": 3, "borderaxespad": 0}
        axis.legend(list(entries.values()), list(entries), **place)


def _at_end(rows: pd.DataFrame, like: pd.DataFrame) -> pd.Series:
    """The largest value of each layer at the last step, among the matrices of other rows."""
    rows = rows[(rows["step"] == like["step"].max()) & rows["matrix"].isin(like["matrix"])]
    return rows[rows["layer"].notna()].groupby("layer")["value"].max()


def _places(rows: pd.DataFrame) -> tuple[list[float], str]:
    """Where the rows of a treatment stand on the horizontal axis, and its name."""
    for column, name in (("layer", "layer"), ("k", "dimension k")):
        if (rows[column] >= 0).all():
            return [float(value) for value in rows[column]], name
    doses = pd.to_numeric(rows["dose"], errors="coerce")
    return [float(value) for value in doses.fillna(0)], "dose"


def _unit(*tables: pd.DataFrame) -> str:
    units = dict.fromkeys(unit for rows in tables for unit in rows["unit"])
    return ", ".join(units)
