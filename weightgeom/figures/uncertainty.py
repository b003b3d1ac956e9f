"""Figures of uncertainty that is detectable but not expressed, drawn from result tables."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Mapping

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weightgeom.figures.base import STYLE

GROUPS = ("#4a90d9", "#c1272d", "#e58a2b", "#8ab17d", "#2a9d8f")  # the factual group is blue
PROFILES = {
    "auroc_logistic": ("held-out AUROC (1)", 0.5),
    "amplification": ("difference of the means\nover the norm (1)", 0.0),
    "mle_dimension_calibrated_ratio": ("ratio of intrinsic\ndimensions (1)", 1.0),
    "gradient_coupling": ("cosine with the gradient\nof abstaining (1)", 0.0),
}


def profiles(table: pd.DataFrame, step: int) -> Figure:
    """Differences between the prompt groups by layer: the dimension of every group, then comparisons.

    Bars are 95 % intervals; the dashed line is no difference. `table` has rows of the probe `uncertainty`.
    """
    rows = table[table["step"] == step]
    colours = _colours(rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(6.5, 4.2), layout="constrained")
        for arm, colour in colours.items():
            _line(axes.flat[0], rows, arm, "mle_dimension_calibrated", colour, arm)
        axes.flat[0].set_ylabel("intrinsic dimension (1)")
        for axis, (quantity, (name, chance)) in zip(axes.flat[1:], PROFILES.items(), strict=False):
            axis.axhline(chance, color="0.5", ls="--", lw=0.8)
            for arm, group in _comparisons(rows).items():
                _line(axis, rows, arm, quantity, colours[group], arm)
            axis.set_ylabel(name)
        axis = axes.flat[5]
        axis.axhline(1, color="0.5", ls="--", lw=0.8)
        for arm, group in _comparisons(rows).items():
            for space, style in (("output_top", "-"), ("output_bottom", ":")):
                label = f"{arm}, {space.replace('_', ' ')}"
                _line(axis, rows, arm, "overlap", colours[group], label, space, style)
        axis.set_ylabel("overlap with the output's\ndirections (1 is chance)")
        for axis in axes.flat:
            _layers(axis)
        _legend(figure, axes.flat)
    return figure


def topology(table: pd.DataFrame, step: int) -> Figure:
    """Components by threshold in the last layer, and persistence by layer, for every group.

    Bars are 95 % intervals from half-samples. `table` has rows of the probe `uncertainty`.
    """
    rows = table[table["step"] == step]
    colours, last = _colours(rows), rows["layer"].max()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(6.5, 2.4), layout="constrained")
        for arm, colour in colours.items():
            part = rows[(rows["treatment"] == arm) & (rows["against"] == "") & (rows["layer"] == last)]
            part = part[part["dose"] != ""]
            part = part.assign(threshold=part["dose"].astype(float))
            wide = part.pivot_table(index="threshold", columns="quantity", values="value")
            value = wide["components"]
            ends = wide.get("components_low", value), wide.get("components_high", value)
            error = [(value - ends[0]).clip(lower=0), (ends[1] - value).clip(lower=0)]
            axes[0].errorbar(
                value.index, value, error, fmt="o-", ms=3, lw=1.2, elinewidth=0.7, color=colour, label=arm
            )
            for axis, quantity in zip(axes[1:], ("persistence_entropy", "longest_loop"), strict=True):
                _line(axis, rows, arm, quantity, colour, arm)
        axes[0].set_xlabel(f"cosine distance (layer {last})")
        axes[0].set_ylabel("components per point (1)")
        axes[1].set_ylabel("persistence entropy (1)")
        axes[2].set_ylabel("longest loop (cosine distance)")
        for axis in axes[1:]:
            _layers(axis)
        _legend(figure, axes)
    return figure


def sensitivity(table: pd.DataFrame, step: int) -> Figure:
    """Fisher sensitivity along the boundary by layer, compared with random and top output directions.

    Bars are 95 % intervals over prompts; the grey band is the random directions' mean ± 2 standard
    deviations. `table` has rows of the probe `uncertainty`.
    """
    rows = table[table["step"] == step]
    colours, arms = _colours(rows), _comparisons(rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(arms), figsize=(3.25 * len(arms), 2.5), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (arm, group) in zip(axes[0], arms.items(), strict=True):
            mean, sd, output = (
                _values(rows, arm, f"fisher_sensitivity_{name}") for name in ("random", "random_sd", "output")
            )
            layers = mean.index.astype(int)
            floor = mean.min() / 100 if mean.min() > 0 else 1e-12
            axis.fill_between(
                layers,
                (mean - 2 * sd).clip(lower=floor),
                mean + 2 * sd,
                color="0.85",
                lw=0,
                label="random ± 2 sd",
            )
            axis.plot(layers, mean, color="0.5", ls="--", lw=0.8, label="random, mean")
            axis.plot(layers, output, color="0.3", ls=":", lw=1, label="top output directions")
            _line(axis, rows, arm, "fisher_sensitivity", colours[group], arm)
            axis.set_yscale("log")
            _layers(axis)
        axes[0][0].set_ylabel("Fisher sensitivity\n(nats per squared share of the norm)")
        _legend(figure, axes[0])
    return figure


def abstentions(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Change of abstention on uncertain prompts against false abstention, with increasing strength.

    One panel per intervention and one line per layer; the random controls of all layers and strengths are
    grey. Bars are ± one standard error over prompts. `tables` has the tables of `steer`, `bypass` and
    `repair` by name.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(tables), figsize=(3.25 * len(tables), 2.8), squeeze=False, layout="constrained"
        )
        for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
            arms = table[table["against"] == ""]
            x, y = ("false_abstention_change", "abstention_change")
            controls = arms[(arms["treatment"] == "random") & arms["draw"].notna()]
            points = controls.pivot_table(index=["layer", "arm"], columns="quantity", values="value")
            axis.plot(points[x], points[y], ".", ms=3, mew=0, color="0.7", label="random controls")
            treated = arms[(arms["treatment"] == name) & arms["draw"].isna()]
            layers = sorted(treated["layer"].unique())
            for number, layer in enumerate(layers):
                part = treated[treated["layer"] == layer]
                part = part.assign(dose=part["dose"].astype(float))
                values, errors = (
                    part.pivot_table(index="dose", columns="quantity", values=column).sort_index()
                    for column in ("value", "stderr")
                )
                axis.errorbar(
                    values[x], values[y], errors[y], errors[x], fmt="o-", ms=3, lw=1, elinewidth=0.7,
                    label=f"layer {layer}",
                    color=plt.get_cmap("Reds")(0.4 + 0.6 * (number + 1) / len(layers)),
                )  # fmt: skip
            axis.axline((0, 0), slope=1, color="0.5", ls="--", lw=0.8)
            axis.set_xlabel(f"change of false abstention (1)\n{name}")
        axes[0][0].set_ylabel("change of abstention (1)")
        _legend(figure, axes[0])
    return figure


def bridge(rows: pd.DataFrame) -> Figure:
    """Change of the boundary's coupling during abstention training, against the RSF of the same deltas.

    Fisher ratio left, gradient coupling right; reads are circles, writes squares. `rows` are those of
    `weightgeom.analysis.bridge`: a point is a layer, with one standard error; with a column `run`, a point is
    the mean over a training's layers, with one colour per training.
    """
    several = "run" in rows
    if several:
        keys = ["quantity", "arm", "role", "run"]
        rows = rows.groupby(keys, sort=False)[["rsf", "change", "stderr"]].mean().reset_index()
    coloured = list(rows["run"].unique()) if several else list(rows["arm"].unique())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.8), layout="constrained")
        for axis, quantity in zip(axes, ("fisher_ratio", "gradient_coupling"), strict=True):
            axis.axhline(0, color="0.5", ls="--", lw=0.8)
            axis.axvline(1, color="0.5", ls="--", lw=0.8)
            part = rows[rows["quantity"] == quantity]
            for key, points in part.groupby(["role", "arm", *(["run"] if several else [])], sort=False):
                role, arm = key[:2]
                index = coloured.index(key[2] if several else arm)
                axis.errorbar(
                    points["rsf"], points["change"], points["stderr"], elinewidth=0.7, ms=4,
                    fmt="o" if role == "read" else "s", color=GROUPS[index % len(GROUPS)],
                    mfc="none" if several and arm != rows["arm"].iloc[0] else None,
                    label=f"{role}s, {', '.join(key[:0:-1])}",
                )  # fmt: skip
            axis.set_xlabel("relative subspace fraction of the update (1)")
            axis.set_ylabel(f"change of {quantity.replace('_', ' ')} (1)")
        _legend(figure, axes)
    return figure


def _colours(rows: pd.DataFrame) -> dict[str, str]:
    groups = rows.loc[(rows["against"] == "") & (rows["dose"] == ""), "treatment"].unique()
    return dict(zip(groups, [GROUPS[index % len(GROUPS)] for index in range(len(groups))], strict=True))


def _comparisons(rows: pd.DataFrame) -> dict[str, str]:
    """The uncertain group of every comparison, by the comparison's name."""
    compared = rows[(rows["against"] != "") & (rows["dose"] == "")]
    return dict(zip(compared["arm"], compared["treatment"], strict=True))


def _values(rows: pd.DataFrame, arm: str, quantity: str, subspace: str = "residual") -> pd.Series:
    kept = (rows["arm"] == arm) & (rows["quantity"] == quantity) & (rows["subspace"] == subspace)
    return rows[kept].set_index("layer")["value"].sort_index()


def _line(
    axis: Axes,
    rows: pd.DataFrame,
    arm: str,
    quantity: str,
    colour: str,
    label: str,
    subspace: str = "residual",
    style: str = "-",
) -> None:
    """Draw a quantity by layer with its interval."""
    value, low, high = (_values(rows, arm, f"{quantity}{end}", subspace) for end in ("", "_low", "_high"))
    error = [(value - low).clip(lower=0), (high - value).clip(lower=0)] if len(low) else None
    axis.errorbar(
        value.index.astype(int), value, error, fmt="o", ls=style, ms=3, lw=1.2, elinewidth=0.7,
        color=colour, label=label,
    )  # fmt: skip


def _layers(axis: Axes) -> None:
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))


def _legend(figure: Figure, axes: object) -> None:
    """One legend below all panels, with one entry per label."""
    entries = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3)
