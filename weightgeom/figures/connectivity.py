"""Figure of the probe `connectivity`."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from weightgeom.figures.base import COLOURS, STYLE

LABELS = {"path_ce_rise": "rise of the held-out loss", "path_kl": "KL from the start"}


def paths(table: pd.DataFrame) -> Figure:
    """Rise of the loss and KL by t along W₀ + t dW at the last step, bars ± one standard error over texts.

    The grey band is the mean ± 2 standard deviations over random directions of equal norm. `table` has rows
    of the probe `connectivity`.
    """
    rows = table[(table["step"] == table["step"].max()) & (table["dose"] != "")]
    rows = rows.assign(t=rows["dose"].astype(float)).sort_values("t")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.6), layout="constrained")
        for axis, (quantity, label) in zip(axes, LABELS.items(), strict=True):
            line, mean, sd = (
                rows[rows["quantity"] == name].set_index("t")
                for name in (quantity, f"null_{quantity}_mean", f"null_{quantity}_sd")
            )
            low, high = mean["value"] - 2 * sd["value"], mean["value"] + 2 * sd["value"]
            axis.fill_between(mean.index, low, high, color="0.85", lw=0, label="random directions ± 2 sd")
            axis.plot(mean.index, mean["value"], color="0.6", lw=0.8)
            axis.errorbar(
                line.index, line["value"], line["stderr"].astype(float).fillna(0),
                fmt="o-", ms=2.5, lw=1.2, elinewidth=0.7, color=COLOURS["q"], label="update",
            )  # fmt: skip
            axis.axvline(1, color="0.5", ls="--", lw=0.8)
            axis.set_xlabel("t of W₀ + t dW (1)")
            axis.set_ylabel(f"{label} ({line['unit'].iloc[0]})")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure
