"""Figure of the probe `spectrum`: stable ranks by layer, over those of noise."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from weightgeom.figures.base import COLOURS, PATHWAYS, STYLE

THINGS = {"delta": "of the update", "weight": "of the weights"}
RANK = "stable_rank"


def things(table: pd.DataFrame) -> list[str]:
    """Those of `THINGS` that the table has stable ranks of."""
    there = set(table["quantity"])
    return [thing for thing in THINGS if f"{thing}_{RANK}" in there]


def stable_ranks(table: pd.DataFrame) -> Figure:
    """Stable rank of every matrix by layer at the last step, over the mean of iid Gaussian entries.

    A row of panels for the update and one for the weights, reads on the left. A point is the mean over
    experts and runs. The dashed line is the null, the Marchenko-Pastur law, and the grey band its mean ± 2
    standard deviations, the widest of the panel's matrices. `table` has rows of the probe `spectrum`.

    Raises:
        ValueError: if the table has no stable rank of an update or of weights.
    """
    rows = table[(table["matrix"] != "") & table["head"].isna()]
    rows = rows[rows["step"] == rows["step"].max()]
    drawn = things(rows)
    if not drawn:
        raise ValueError("no stable rank of an update or of weights in the table")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(drawn), 2, figsize=(6.5, 0.6 + 1.9 * len(drawn)), sharex=True, sharey="row", squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for thing, line in zip(drawn, axes, strict=True):
            values, mean, sd = (
                rows[rows["quantity"] == quantity]
                .groupby(["role", "matrix", "layer"], sort=False)["value"]
                .mean()
                for quantity in (f"{thing}_{RANK}", f"null_{thing}_{RANK}_mean", f"null_{thing}_{RANK}_sd")
            )
            ratios, widths = values / mean, sd / mean
            for role, axis in zip(PATHWAYS, line, strict=True):
                if role not in ratios.index.get_level_values("role"):
                    continue
                width = widths[role].groupby("layer").max()
                layers = width.index.astype(int)
                axis.fill_between(
                    layers, 1 - 2 * width, 1 + 2 * width, color="0.85", lw=0, label="iid entries ± 2 sd"
                )
                axis.axhline(1, color="0.5", ls="--", lw=0.8)
                for matrix, part in ratios[role].groupby("matrix", sort=False):
                    part = part.droplevel("matrix").sort_index()
                    axis.plot(
                        part.index.astype(int), part, "o-", ms=3, lw=1.2, color=COLOURS[str(matrix)],
                        label=str(matrix),
                    )  # fmt: skip
                axis.set_yscale("log")
                axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            line[0].set_ylabel(f"stable rank {THINGS[thing]}\nover that of noise (1)")
        for role, axis in zip(PATHWAYS, axes[-1], strict=True):
            axis.set_xlabel(f"layer ({PATHWAYS[role]})")
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.35), ncols=4, borderaxespad=0)
    return figure
