"""Figures of a chain of stages, drawn from its table `stages`."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weightgeom.figures.base import COLOURS, PATHWAYS, STYLE

SPREAD = 0.76  # share of the distance between two stages that one stage's matrices occupy


def ratio_by_stage(table: pd.DataFrame) -> Figure:
    """Ratio of every matrix by stage, compared with the first stage (top) and the stage before (bottom).

    Read is on the left, write on the right. A point is the mean over layers, the small points are the layers.
    The bar is the 95 % interval over prompts, if the subspace is estimated from text; the grey band is the
    null's mean ± 2 standard deviations of the mean over layers; the dashed line is the isotropic level.
    `table` has the columns of all tables, and `stage` and `against`, in the order of the chain; a row without
    a layer is the mean over layers.
    """
    first = str(table["against"].iloc[0])
    stages = [str(stage) for stage in dict.fromkeys(table["stage"])]
    rows = {f"against {first}": dict.fromkeys(stages, first)}
    if len(stages) > 1:
        rows["against the stage before"] = dict(zip(stages, [first, *stages], strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            *(len(rows), 2),
            figsize=(max(6.5, 1.4 + 1.4 * len(stages)), 0.7 + 2.1 * len(rows)),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for line, (comparison, against) in zip(axes, rows.items(), strict=True):
            for axis, (role, title) in zip(line, PATHWAYS.items(), strict=True):
                mine = table[(table["role"] == role) & (table["against"] == table["stage"].map(against))]
                _panel(axis, mine, stages)
                pairs = [f"{against[stage]} →\n{stage}" for stage in stages]
                axis.set_xticks(range(len(stages)), pairs)
                axis.set_xlabel(f"{comparison} ({title})")
            line[0].set_ylabel("relative subspace fraction (1)\nlayers, and their mean")
        axes[0][0].set_ylim(bottom=0)
        for axis in axes[-1]:
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.36), ncols=5, borderaxespad=0)
    return figure


def _panel(axis: Axes, table: pd.DataFrame, stages: list[str]) -> None:
    """One pathway's matrices, side by side at every stage."""
    axis.axhline(1, color="0.5", ls="--", lw=0.8)
    matrices = [matrix for matrix in COLOURS if matrix in set(table["matrix"])]
    width = SPREAD / max(1, len(matrices))
    for number, matrix in enumerate(matrices):
        offset = (number + 0.5) * width - SPREAD / 2
        mine = table[table["matrix"] == matrix]
        place = mine["stage"].map({stage: float(n) for n, stage in enumerate(stages)}) + offset
        mine = mine.assign(x=place.astype(float)).set_index("x")
        layers, means = mine[mine["layer"].notna()], mine[mine["layer"].isna()]
        null, sd = _of(means, "null_ratio_mean"), _of(means, "null_ratio_sd")
        axis.bar(
            null.index,
            4 * sd,
            width,
            null - 2 * sd,
            color="0.85",
            lw=0,
            label="_" if number else "null ± 2 sd",
        )
        single = _of(layers, "ratio")
        axis.plot(single.index + width / 4, single, "o", ms=1.8, mew=0, alpha=0.5, color=COLOURS[matrix])
        ratio = _of(means, "ratio")
        low, high = (_of(means, end).reindex(ratio.index) for end in ("ratio_low", "ratio_high"))
        axis.errorbar(
            ratio.index,
            ratio,
            [(ratio - low).clip(lower=0).fillna(0), (high - ratio).clip(lower=0).fillna(0)],
            fmt="o" if (mine["role"] == "read").all() else "s",
            ms=4,
            elinewidth=1.2,
            capsize=2,
            color=COLOURS[matrix],
            label=matrix,
        )
    axis.set_xlim(-0.5, len(stages) - 0.5)


def _of(rows: pd.DataFrame, quantity: str) -> pd.Series:
    return rows[rows["quantity"] == quantity]["value"].sort_index()
