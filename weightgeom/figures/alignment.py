"""Figures of the alignment of updates: heat maps of all pairs, and locking by step."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from weightgeom.figures.base import COLOURS, STYLE

MAPS = {  # colours: diverging around 0, or from none to all
    "cosine": ("cosine", "RdBu_r", -1.0),
    "alignment_ratio": ("subspace alignment ratio", "Greys", 0.0),
    "mode_overlap": ("mode subspace overlap", "Greys", 0.0),
}


def heat_maps(pairs: pd.DataFrame, names: Mapping[Any, str]) -> Figure:
    """Cosine, subspace alignment ratio and mode overlap of every pair of updates over all matrices.

    A row of a map is the update A, a column the update B; the number in brackets is the null's mean, and of
    the cosine its standard deviation. `pairs` has rows without a matrix, their update in the column `step`
    and the other one in `against`; `names` are those of the updates, in order.
    """
    keys = list(names)
    places = {str(key): place for place, key in enumerate(keys)}
    with plt.rc_context(STYLE):
        size = 1.0 + 0.55 * len(keys)
        figure, axes = plt.subplots(1, 3, figsize=(3 * size + 1.2, size + 0.8), layout="constrained")
        for axis, (quantity, (label, colours, low)) in zip(axes, MAPS.items(), strict=True):
            values, null = (np.full((len(keys), len(keys)), np.nan) for _ in range(2))
            end = "sd" if quantity == "cosine" else "mean"
            for name, target in ((quantity, values), (f"null_{quantity}_{end}", null)):
                rows = pairs[pairs["quantity"] == name]
                for treatment, against, value in zip(
                    rows["step"], rows["against"], rows["value"], strict=True
                ):
                    target[places[str(treatment)], places[str(against)]] = value
                    if quantity != "alignment_ratio":
                        target[places[str(against)], places[str(treatment)]] = value
            image = axis.imshow(values, cmap=colours, vmin=low, vmax=1.0)
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    dark = abs(value) > 0.6
                    axis.text(
                        column, row, f"{value:.2f}\n({null[row, column]:.2g})",
                        ha="center", va="center", fontsize=5, color="white" if dark else "black",
                    )  # fmt: skip
            axis.set_xticks(range(len(keys)), names.values(), rotation=90)
            axis.set_yticks(range(len(keys)), names.values())
            axis.set_xlabel("update B")
            figure.colorbar(image, ax=axis, location="top", label=f"{label} (1)", fraction=0.05)
        axes[0].set_ylabel("update A")
    return figure


def locking(table: pd.DataFrame) -> Figure:
    """Overlap of the update's leading input directions with those at the end, by step, mean over layers.

    The dashed line is the null's mean K/d, the largest among the matrices; the grey line the mean over all
    matrices where the rest of the update is rotated at random. `table` has rows of the probe `alignment`.
    """
    rows = table[table["quantity"] == "locking"]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3.25, 2.6), layout="constrained")
        for (matrix, role), part in rows.groupby(["matrix", "role"], sort=False):
            means = part.groupby("step")["value"].mean()
            style = "--" if role == "write" else "-"
            colour = COLOURS.get(str(matrix), "0.35")
            axis.plot(means.index, means, style, marker="o", ms=2.5, lw=1.2, color=colour, label=str(matrix))
        walk = table[table["quantity"] == "walk_locking_mean"].groupby("step")["value"].mean()
        axis.plot(walk.index, walk, "x-", ms=3, lw=0.8, color="0.6", label="rest at random")
        null = table[table["quantity"] == "null_locking_mean"]["value"].max()
        axis.axhline(null, color="0.5", ls="--", lw=0.8, label="K/d")
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xlabel("optimizer step, or stage")
        axis.set_ylabel("subspace locking (1)\nmean over layers")
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.28), ncols=4, borderaxespad=0)
    return figure
