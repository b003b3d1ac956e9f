"""Figures of the probes' result tables, and the style shared by all figures."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "pdf.fonttype": 42,  # TrueType: text stays text in the PDF
    "svg.hashsalt": "weightgeom",
}
# One colour per matrix kind in every figure: reads in blues and greens, writes in reds.
COLOURS = {
    "q": "#1f4e9c",
    "k": "#4a90d9",
    "v": "#2a9d8f",
    "q_a": "#3b2f7f",
    "kv_a": "#17697a",
    "k_rope": "#9cc9ec",
    "gate": "#8ab17d",
    "router": "#b0a160",
    "up": "#5c7f3f",
    "shared_gate": "#c6dbbd",
    "shared_up": "#2f4a1e",
    "o": "#c1272d",
    "down": "#e58a2b",
    "shared_down": "#9a4f12",
    "attention_gate": "#7b6fb8",
    "linear_q": "#123a6b",
    "linear_k": "#3f74b5",
    "linear_v": "#1d7f74",
    "linear_z": "#6fb7c9",
    "linear_b": "#94a7d6",
    "linear_a": "#56698f",
    "linear_o": "#8f1d3f",
    "conv_B": "#3d8f5f",
    "conv_C": "#a3c46b",
    "conv_x": "#27613f",
    "conv_o": "#d4576b",
    "mamba_z": "#7fc4b8",
    "mamba_x": "#0f6a7a",
    "mamba_B": "#5a9e9e",
    "mamba_C": "#a9b98a",
    "mamba_dt": "#8594a8",
    "mamba_o": "#b8482a",
}
ENDS = ("graded/dpo", "dpo", "graded/ce", "sft")  # the ends of the graded family, by either name
PATHWAYS = {"read": "read pathway", "write": "write pathway"}


def ratio_by_layer(table: pd.DataFrame, step: int) -> Figure:
    """Ratio of every matrix by layer at one step: read on the left, write on the right.

    The grey band is the null's mean ± 2 standard deviations, the widest among the panel's matrices; the
    dashed line is the isotropic level. `table` has rows of the probe `rsf`.
    """
    rows = _own(table[table["step"] == step])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.4), sharey=True, layout="constrained")
        for axis, (role, title) in zip(axes, PATHWAYS.items(), strict=True):
            part = rows[rows["role"] == role]
            sd = part[part["quantity"] == "null_ratio_sd"].groupby("layer")["value"].max()
            mean = part[part["quantity"] == "null_ratio_mean"].groupby("layer")["value"].mean()
            axis.fill_between(
                sd.index.astype(int), mean - 2 * sd, mean + 2 * sd, color="0.85", lw=0, label="null ± 2 sd"
            )
            _chance(axis)
            for matrix, ratios in part[part["quantity"] == "ratio"].groupby("matrix", sort=False):
                means = ratios.groupby("layer")["value"].mean()  # over experts
                axis.plot(
                    means.index.astype(int),
                    means,
                    "o-",
                    ms=3,
                    lw=1.2,
                    color=COLOURS[str(matrix)],
                    label=str(matrix),
                )
            axis.set_xlabel(f"layer ({title})")
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.28), ncols=3, borderaxespad=0)
        axes[0].set_ylabel("relative subspace fraction (1)")
        axes[0].set_ylim(bottom=0)
    return figure


def ratio_by_step(tables: Mapping[str, pd.DataFrame], quantity: str = "ratio") -> Figure:
    """Ratio by optimizer step, mean and standard deviation over layers, with one panel per trajectory.

    Read matrices are solid, write matrices dashed. `tables` has rows of the probe `rsf` by the trajectory's
    name; a table's attribute `at` names the checkpoint of the subspaces. `quantity` is `ratio`, of the update
    since the start, or `increment_ratio`, of the update between neighbouring checkpoints.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(tables),
            figsize=(3.25 * len(tables), 2.6),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
            rows = _own(table)
            rows = rows[rows["quantity"] == quantity]
            _chance(axis)
            for (matrix, role), part in rows.groupby(["matrix", "role"], sort=False):
                by_step = part.groupby("step")["value"]
                axis.errorbar(
                    by_step.mean().index,
                    by_step.mean(),
                    by_step.std().fillna(0),
                    ls="-" if role == "read" else "--",
                    marker="o",
                    ms=2.5,
                    lw=1.2,
                    elinewidth=0.7,
                    color=COLOURS[str(matrix)],
                    label=str(matrix),
                )
            axis.set_xscale("log", base=2)
            at = table.attrs.get("at")
            whose = f"; subspaces of {'each' if at == 'step' else 'the'} {at}" if at else ""
            axis.set_xlabel(f"optimizer step ({name}{whose})")
            if len(rows):  # a trajectory without any update has no ratio
                axis.legend(loc="upper left", bbox_to_anchor=(0, -0.28), ncols=4, borderaxespad=0)
        what = "relative subspace fraction" + (" of increments" if quantity == "increment_ratio" else "")
        axes[0][0].set_ylabel(f"{what} (1)\nmean over layers ± s.d.")
        axes[0][0].set_ylim(bottom=0)  # last, because it freezes the shared upper limit
    return figure


def expected_and_measured(table: pd.DataFrame) -> Figure:
    """Measured ratio against the ratio expected from the base's moments: predicted left, forecast right.

    The forecast is the one that belongs to the optimizer of each training, by the column `treatment`, and
    the axis names it; that of the plain mean gradient in tables that do not name an optimizer. A point is a
    matrix of a layer at the last step, with the bootstrap's standard error over prompts as its bar; reads are
    circles, writes squares. The dashed line is the identity. `table` has rows of the probe `moments`; with a
    column `run`, points of all runs are drawn, each at its last step and smallest k.
    """
    runs = [part for _, part in table.groupby("run")] if "run" in table else [table]
    rows = pd.concat([_own(part[part["step"] == part["step"].max()]) for part in runs])
    rows = rows.assign(expert=rows["expert"].fillna(-1))
    by = [*(["run"] if "run" in rows else []), "layer", "matrix", "expert", "role"]
    measured = rows[rows["quantity"] == "measured_ratio"].set_index(by)["value"]
    top = measured.max()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(6.5, 3.2), sharey=True, layout="constrained")
        sides = ("predicted", rows[rows["quantity"] == "predicted_ratio"]), _own_forecasts(rows, by)
        for axis, (name, expected) in zip(axes, sides, strict=True):
            expected = expected.set_index(by)
            expected = expected[expected.index.isin(measured.index)]
            top = max(top, expected["value"].max())
            for (matrix, role), part in expected.groupby(["matrix", "role"], sort=False):
                axis.errorbar(
                    part["value"],
                    measured[part.index],
                    xerr=part["stderr"].astype(float).fillna(0),
                    fmt="o" if role == "read" else "s",
                    ms=3.5,
                    elinewidth=0.7,
                    color=COLOURS[str(matrix)],
                    label=str(matrix),
                )
            axis.set_xlabel(f"{name} relative subspace fraction (1)")
            if len(expected):
                axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=4, borderaxespad=0)
        for axis in axes:
            axis.plot([0, 1.05 * top], [0, 1.05 * top], color="0.5", ls="--", lw=0.8)
            axis.set_aspect("equal")
        axes[0].set_ylabel("measured (1)")
    return figure


def _own_forecasts(rows: pd.DataFrame, by: list[str]) -> tuple[str, pd.DataFrame]:
    """The forecasts that belong to the trainings' optimizers, where there is an update, and their names."""
    moved = pd.MultiIndex.from_frame(rows[rows["quantity"] == "measured_ratio"][by])
    places = pd.MultiIndex.from_frame(rows[by])
    named = rows["treatment"] != ""
    forecast = rows["quantity"].str.startswith("forecast") & ~rows["quantity"].str.endswith(("_low", "_high"))
    plain = (rows["quantity"] == "forecast_ratio") & ~places.isin(places[named])
    forecasts = rows[(named & forecast | plain) & places.isin(moved)]
    names = forecasts["quantity"].str.removesuffix("_ratio").str.cat(forecasts["treatment"], sep=" (") + ")"
    names = names.str.removesuffix(" ()").unique()
    return ",\n".join(names) or "forecast", forecasts


def ratio_by_sharpness(
    rows: pd.DataFrame,
    correlations: Mapping[str, tuple[float, float]],
    measure: str = "participation ratio of the logit gradient",
) -> Figure:
    """Ratio of the read and the write side against the sharpness measured during training.

    A point is one objective, the mean over its seeds, with bars of ± 2 standard errors over seeds if there
    are several; the grey points are single runs. `rows` has the columns `run`, `role`, `sharpness` (the
    `measure`) and `ratio`; `correlations` has Spearman's rank correlation over objectives and its p-value by
    role. The exact ends of the family are squares.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(6.5, 3.0), sharey=True, layout="constrained")
        for axis, (role, title) in zip(axes, PATHWAYS.items(), strict=True):
            part = rows[rows["role"] == role]
            axis.plot(part["sharpness"], part["ratio"], "o", color="0.75", ms=2.5)
            by_run = part.groupby("run", sort=False)[["sharpness", "ratio"]]
            means, errors = by_run.mean(), 2 * by_run.sem().fillna(0)
            for number, run in enumerate(means.index):
                end = str(run).split(" ")[0] in ENDS
                axis.errorbar(
                    *means.loc[run, ["sharpness", "ratio"]],
                    xerr=errors.loc[run, "sharpness"],
                    yerr=errors.loc[run, "ratio"],
                    fmt="s" if end else "o",
                    ms=4,
                    elinewidth=0.7,
                    color=COLOURS["q" if role == "read" else "o"],
                )
                axis.annotate(
                    str(run).removeprefix("graded/"),
                    means.loc[run, ["sharpness", "ratio"]],
                    xytext=(3, 3 + 5 * (number % 3)),  # keeps labels of coinciding points apart
                    textcoords="offset points",
                    fontsize=5.5,
                )
            _chance(axis)
            if len(part) and part["sharpness"].max() > 10 * part["sharpness"].min():
                axis.set_xscale("log")
            rank, p = correlations[role]
            axis.set_xlabel(f"{measure}\n{title}: rank {rank:.2f}, p {p:.2g}")
        axes[0].set_ylabel("relative subspace fraction (1)\nmean over matrices ± 2 s.e. over seeds")
        axes[0].set_ylim(bottom=0)
    return figure


def ratio_by_run(
    rows: pd.DataFrame,
    quantity: str = "ratio",
    label: str = "relative subspace fraction (1)",
    chance: float | None = 1.0,
) -> Figure:
    """A quantity of every matrix after training, for each run of a sweep: reads left, writes right.

    A point is the mean over layers and seeds, with bars of ± 2 standard errors over seeds if there are
    several. `rows` has the columns `run`, `matrix`, `role`, `quantity` and `value`; the dashed
    line is at `chance`.
    """
    ratios = rows[rows["quantity"] == quantity]
    runs = list(dict.fromkeys(ratios["run"]))
    with plt.rc_context(STYLE):
        height = 1.2 + 0.28 * len(runs)
        figure, axes = plt.subplots(
            1, 2, figsize=(6.5, height), sharex=True, sharey=True, layout="constrained"
        )
        for axis, (role, title) in zip(axes, PATHWAYS.items(), strict=True):
            part = ratios[ratios["role"] == role]
            matrices = [matrix for matrix in COLOURS if matrix in set(part["matrix"])]
            for number, matrix in enumerate(matrices):
                of_runs = part[part["matrix"] == matrix].groupby("run")["value"]
                means, errors = of_runs.mean(), 2 * of_runs.sem().fillna(0)
                offset = 0.6 * ((number + 0.5) / len(matrices) - 0.5)  # keeps the bars apart
                places = [runs.index(run) + offset for run in means.index]
                axis.errorbar(
                    means,
                    places,
                    xerr=errors,
                    fmt="o",
                    ms=3,
                    elinewidth=0.7,
                    color=COLOURS[matrix],
                    label=matrix,
                )
            if chance is not None:
                axis.axvline(chance, color="0.5", ls="--", lw=0.8)
            axis.set_xlabel(f"{label}\n{title}, mean over layers ± 2 s.e. over seeds")
            if matrices:
                axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)
        axes[0].set_yticks(range(len(runs)), runs)
        axes[0].set_ylim(len(runs) - 0.5, -0.5)
        axes[0].set_xlim(left=0)
    return figure


def save(figure: Figure, *paths: Path) -> None:
    """Write the figure to each path, as PNG or PDF by its extension; equal figures give equal bytes."""
    with plt.rc_context(STYLE):  # also sets the font type of the PDF
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out; every file would do it twice again
        for path in paths:
            date = {"CreationDate": None} if path.suffix == ".pdf" else {}
            figure.savefig(path, dpi=200, bbox_inches="tight", metadata=date)
    plt.close(figure)


def _own(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of matrices, no heads, with their own subspaces, at the smallest k."""
    rows = table[table["head"].isna() & ~table["subspace"].isin(["", "random"])]
    return rows[rows["k"] == rows["k"].min()]


def _chance(axis: Axes) -> None:
    axis.axhline(1, color="0.5", ls="--", lw=0.8)
