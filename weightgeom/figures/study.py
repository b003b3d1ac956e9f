"""Figures of all runs of a study, drawn from its tables aggregated over seeds."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from math import ceil

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weightgeom.figures.base import COLOURS, PATHWAYS, STYLE

SIDES = {"read": COLOURS["q"], "write": COLOURS["o"]}


def ratios_by_setting(means: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Ratio of every setting, read on the left and write on the right, sorted by the write ratio.

    A grey point is one run, the mean over layers and matrices; the coloured point is the mean over runs, with
    its 95 % interval (`low`, `high`). The grey band is the rotation null's mean ± 2 standard deviations; the
    dashed line is the isotropic level. `means` has the columns `setting role ratio low high null_mean
    null_sd`, `runs` the columns `setting role ratio`.
    """
    writes = means[means["role"] == "write"].set_index("setting")["ratio"].to_dict()
    settings = sorted(dict.fromkeys(means["setting"]), key=lambda name: writes.get(name, 0.0), reverse=True)
    places = {setting: number for number, setting in enumerate(settings)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            *(1, 2), figsize=(6.5, 1.1 + 0.27 * len(settings)), sharex=True, sharey=True, layout="constrained"
        )
        for axis, (role, title) in zip(axes, PATHWAYS.items(), strict=True):
            mine = means[means["role"] == role]
            y = mine["setting"].map(places).astype(float)
            axis.barh(
                y,
                4 * mine["null_sd"],
                left=mine["null_mean"] - 2 * mine["null_sd"],
                height=0.7,
                color="0.87",
                label="null ± 2 sd",
            )
            axis.axvline(1, color="0.5", ls="--", lw=0.8)
            single = runs[runs["role"] == role]
            below = single["setting"].map(places).astype(float) + 0.22
            axis.plot(single["ratio"], below, "o", ms=2.5, color="0.6", label="one run")
            ends = [(mine["ratio"] - mine["low"]), (mine["high"] - mine["ratio"])]
            axis.errorbar(
                mine["ratio"],
                y,
                xerr=[distance.astype(float).fillna(0) for distance in ends],
                fmt="o",
                ms=4,
                elinewidth=0.9,
                color=SIDES[role],
                label=f"{role}: mean, 95 % interval",
            )
            axis.set_xlabel(f"relative subspace fraction (1)\n{title}")
        axes[0].set_yticks(range(len(settings)), settings)
        axes[0].set_ylim(len(settings) - 0.4, -0.6)
        axes[0].set_xlim(0, _top(means, runs))
        _legend(figure, list(axes))
    return figure


def ratio_along_training(table: pd.DataFrame) -> Figure:
    """Ratio by optimizer step, with one panel per setting: mean over layers and runs, with standard error.

    The error is over runs, where there are several. Read matrices are solid, write matrices
    dashed; the grey dashed line is the isotropic level. `table` has the columns `setting step matrix role
    ratio stderr`.
    """
    settings = list(dict.fromkeys(table["setting"]))
    across = min(3, len(settings))
    down = ceil(len(settings) / across)
    width = 3.25 if across == 1 else 6.5
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            *(down, across),
            figsize=(width, 0.6 + 1.9 * down),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat[len(settings) :]:
            axis.remove()
        drawn = dict(zip(settings, axes.flat, strict=False))
        for setting, axis in drawn.items():
            part = table[table["setting"] == setting]
            axis.axhline(1, color="0.5", ls="--", lw=0.8)
            for matrix in (matrix for matrix in COLOURS if matrix in set(part["matrix"])):
                line = part[part["matrix"] == matrix].sort_values("step")
                axis.errorbar(
                    line["step"],
                    line["ratio"],
                    line["stderr"].astype(float).fillna(0),
                    ls="--" if (line["role"] == "write").all() else "-",
                    marker="o",
                    ms=2.5,
                    lw=1.1,
                    elinewidth=0.7,
                    color=COLOURS[matrix],
                    label=matrix,
                )
            if part["step"].max() > 8:
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%d"))
            axis.set_xlabel(f"optimizer step\n{setting}")
        for line in axes:
            line[0].set_ylabel("relative subspace\nfraction (1) ± s.e.")
        axes[0][0].set_ylim(bottom=0)
        _legend(figure, list(drawn.values()), columns=7)
    return figure


def _top(*tables: pd.DataFrame) -> float:
    """The upper limit of the axis, above all means and runs; a wide interval may be clipped."""
    return 1.15 * max(2.0, *(float(table["ratio"].max()) for table in tables))


def _legend(figure: Figure, axes: list[Axes], columns: int = 4) -> None:
    """One legend below all panels, with one entry per label."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)
