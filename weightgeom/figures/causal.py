"""Figures of interventions, drawn from result tables: treatments in colour, controls in grey."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false

from collections.abc import Sequence
from math import ceil

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from weightgeom.figures.base import COLOURS, PATHWAYS, STYLE

LEVEL = 0.05  # of significance
# Controls of a rank-1 edit: name, marker, grey level, and offset from the layer's tick.
CONTROLS = {
    "random": ("random", ".", "0.62", 0.0),
    "orthogonal": ("orthogonal to the top k", "x", "0.72", -0.2),
    "within": ("random in the top k", "+", "0.45", 0.2),
    "layer": ("another layer's", "D", "0.55", 0.3),
    "bottom": ("bottom", "v", "0.25", 0.0),
}
# Controls of a surgery: name, marker, grey level, and factor on k that keeps the points apart.
MATCHED = {
    "random_k": ("random, same k", "s", "0.35", 0.94),
    "random_energy": ("random, same energy", "^", "0.62", 1.06),
}
TRANSPLANTS = ("replace", "transplant")  # all weights, and a part of the matrices
DOSES = {"remove": "removed", "keep": "kept alone", "scale": "scaled"}
ROLES = {"": "0.1", "read": COLOURS["q"], "write": COLOURS["o"]}
MARGIN = "preference_margin_change"
EFFECTS = {
    "kl_from_unedited": "KL from\nthe unedited model",
    "heldout_ce_change": "change of\nheld-out cross-entropy",
    MARGIN: "change of\nthe preference margin",
    "preference_accuracy_change": "change of\npreference accuracy",
    "fact_accuracy_change": "change of\nfact accuracy",
}


def treatment_by_layer(table: pd.DataFrame, effect: str = "kl_from_unedited") -> Figure:
    """Effects of the treatment and of every control by layer, at the largest strength, one panel per matrix.

    Changes are absolute, like the changes that the p-values test. Bars are ± one standard error over prompts.
    The treatment's marker is filled if its p-value against the random controls is at most 0.05, and open if
    it is larger or missing. A bottom control does least if its absolute effect is below the treatment's and
    below the medians of all other kinds. Controls drawn at the lower edge lie below it. `table` has rows of
    the intervention `rank1`.

    Raises:
        KeyError: if the table has no such effect.
    """
    rows = _of(table, effect)
    dose = max(rows["dose"].unique(), key=float)
    rows = rows[rows["dose"] == dose]
    rows = rows.assign(value=rows["value"].abs())
    p_values = table[table["quantity"] == f"{effect}_p_value"]
    p_values = p_values[(p_values["dose"] == dose) & (p_values["against"] == "random")]
    with plt.rc_context(STYLE):
        figure, panels = _panels(rows, 2.7)
        for matrix, axis in panels.items():
            part, colour = rows[rows["matrix"] == matrix], COLOURS[matrix]
            treatment = part[part["draw"].isna()].sort_values("layer")
            random = part[part["draw"].notna() & (part["treatment"] == "random")]
            p = p_values[p_values["matrix"] == matrix].set_index("layer")["value"]
            layers, values = treatment["layer"].astype(int), treatment["value"]
            floor = _floor(values, random["value"]) / 10
            axis.plot(
                layers,
                values,
                lw=1.2,
                color=colour,
                zorder=4,
                label=f"{matrix}: {treatment['treatment'].iloc[0]}",
            )
            _bars(axis, layers, treatment, colour)
            beats = treatment["layer"].isin(p.index[p <= LEVEL])
            for subset, face in ((beats, colour), (~beats, "white")):
                axis.plot(layers[subset], values[subset], "o", ms=4, color=colour, mfc=face, zorder=5)
            for kind in CONTROLS:
                controls = part[part["draw"].notna() & (part["treatment"] == kind)]
                if len(controls):
                    _strip(axis, kind, controls.assign(value=controls["value"].clip(1.3 * floor)))
            _log(axis, floor)
            axis.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
            axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, min_n_ticks=1))
            below = ["points at the lower edge lie below it"] if (part["value"] < 1.3 * floor).any() else []
            notes = [_significance(p), *_least(part), *below]
            axis.set_xlabel("\n".join([f"layer ({matrix}, strength {dose})", *notes]))
        _label(panels, effect, rows)
        _legend(figure, panels, _significances("random"))
    return figure


def dose_response(table: pd.DataFrame, effect: str = "heldout_ce_change") -> Figure:
    """Absolute effect by strength, mean over layers, one panel per matrix; thin lines are single layers.

    Effects are absolute, because the sign of each layer's direction is arbitrary. Bars are the mean over
    layers of the standard error over prompts, an upper bound on that of the mean, as layers share the
    prompts. The dashed line is the first-order prediction. The grey line is the median of the random
    controls, each draw also a mean over layers, and the band their central 90 %. `table` has rows of the
    intervention `rank1`.

    Raises:
        KeyError: if the table has no such effect.
    """
    rows = _of(table, effect)
    predicted = table[table["quantity"] == f"predicted_{effect}"]
    rows, predicted = (
        part.assign(strength=part["dose"].astype(float), value=part["value"].abs()).sort_values("strength")
        for part in (rows, predicted[predicted["draw"].isna()])
    )
    with plt.rc_context(STYLE):
        figure, panels = _panels(rows, 2.3)
        for matrix, axis in panels.items():
            part, colour = rows[rows["matrix"] == matrix], COLOURS[matrix]
            treatment = part[part["draw"].isna()]
            means = treatment.groupby("strength")[["value", "stderr"]].mean()
            first = predicted[predicted["matrix"] == matrix].groupby("strength")["value"].mean()
            random = part[part["draw"].notna() & (part["treatment"] == "random")]
            draws = random.groupby(["strength", "draw"])["value"].mean().groupby("strength")
            low, middle, high = (draws.quantile(share) for share in (0.05, 0.5, 0.95))
            name = f"{matrix}: {treatment['treatment'].iloc[0]}"
            axis.plot(means.index, means["value"], "o-", ms=3, lw=1.2, color=colour, label=name)
            _bars(axis, means.index, means, colour)
            if len(first):
                axis.plot(first.index, first, color=colour, ls="--", lw=1)
            for _, layer in treatment.groupby("layer"):
                axis.plot(layer["strength"], layer["value"], color=colour, lw=0.6, alpha=0.4)
            if len(random):
                axis.plot(middle.index, middle, color="0.5", lw=1, label="random, median")
                axis.fill_between(low.index, low, high, color="0.85", lw=0, label="random, central 90 %")
            axis.set_xscale("log")
            axis.set_xticks(means.index, [f"{strength:g}" for strength in means.index])
            axis.minorticks_off()
            _log(axis, _floor(pd.concat([treatment["value"], first]), low) / 2)
            axis.set_xlabel(f"strength ({matrix})")
        _label(panels, effect, rows, "\nmean over layers")
        lines = [Line2D([], [], color="0.1", lw=0.6, alpha=0.4, label="single layers")]
        if len(predicted):
            lines.append(Line2D([], [], color="0.1", ls="--", lw=1, label="first-order prediction"))
        _legend(figure, panels, lines)
    return figure


def surgery_curve(table: pd.DataFrame) -> Figure:
    """Change of the preference margin when the update's concentrated part is removed, or is all that is kept.

    By dimension k, with one row of panels per group of matrices: the part removed on the left, only the part
    kept on the right. Bars of the treatment are ± one standard error over prompts; those of the controls are
    the range of the draws around their mean. The dashed line is the unedited model. `table` has rows of the
    intervention `surgery`.

    Raises:
        ValueError: if the table has no such rows.
    """
    rows = table[table["quantity"] == MARGIN]
    rows = rows[rows["dose"].isin(list(DOSES))]
    if not len(rows):
        raise ValueError(f"no rows of {MARGIN} with the doses {list(DOSES)} in the table")
    doses = [dose for dose in DOSES if dose in set(rows["dose"])]
    groups = _groups(rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(groups),
            len(doses),
            figsize=(3.25 * len(doses), 0.6 + 2 * len(groups)),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for (matrix, role), line in zip(groups, axes, strict=True):
            colour, name = COLOURS.get(matrix, ROLES[role]), matrix or role
            for dose, axis in zip(doses, line, strict=True):
                axis.axhline(0, color="0.5", ls="--", lw=0.8, label="unedited model")
                part = rows[(rows["matrix"] == matrix) & (rows["role"] == role) & (rows["dose"] == dose)]
                treatment = part[part["draw"].isna()].sort_values("k")
                k, values = treatment["k"].astype(float), treatment["value"]
                label = f"{name}: top directions"
                axis.plot(k, values, "o-", ms=3, lw=1.2, color=colour, label=label, zorder=3)
                _bars(axis, k, treatment, colour)
                for kind, (label, marker, grey, factor) in MATCHED.items():
                    draws = part[(part["treatment"] == kind) & part["draw"].notna()].groupby("k")["value"]
                    if len(draws):
                        k = draws.mean().index.astype(float) * factor
                        axis.plot(k, draws.mean(), marker=marker, ms=2.5, lw=0.8, color=grey, label=label)
                        axis.vlines(k, draws.min(), draws.max(), color=grey, lw=0.7)
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%d"))
            line[0].set_ylabel(f"margin change (nats/pair)\n{matrix or PATHWAYS[role]}")
        for dose, axis in zip(doses, axes[-1], strict=True):
            axis.set_xlabel(f"dimensions k {DOSES[dose]}")
        _legend(figure, {str(number): axis for number, axis in enumerate(axes.flat)})
    return figure


def transplants(table: pd.DataFrame) -> Figure:
    """Change of the base's preference margin by each part of the update: all, a pathway, or a matrix kind.

    Bars are ± one standard error over prompts; the rotated controls are grey. The marker is filled if the
    p-value against the rotated controls is at most 0.05. The dashed line is the base. The diamond, which has
    no controls, is the change by all weights less those by the pathways and by the rest. `table`
    has rows of the intervention `surgery`.

    Raises:
        ValueError: if the table has no such rows.
    """
    rows = table[table["quantity"] == MARGIN]
    rows = rows[rows["dose"].isin(TRANSPLANTS)]
    if not len(rows):
        raise ValueError(f"no rows of {MARGIN} with the dose transplant in the table")
    p_values = table[table["quantity"] == f"{MARGIN}_p_value"]
    p_values = p_values[p_values["dose"].isin(TRANSPLANTS) & (p_values["against"] == "rotated")]
    by = ["matrix", "role", "dose"]
    p = p_values.set_index(by)["value"]
    names: list[str] = []
    with plt.rc_context(STYLE):
        trials = [
            part
            for matrix, role in _groups(rows)
            for dose in TRANSPLANTS
            if len(part := rows[(rows[by] == [matrix, role, dose]).all(axis=1)])
        ]
        height = 1.2 + 0.25 * (len(trials) + 1)
        figure, axis = plt.subplots(figsize=(3.25, height), layout="constrained")
        axis.axvline(0, color="0.5", ls="--", lw=0.8, label="base")
        for place, part in enumerate(trials):
            controls, treatment = part[part["draw"].notna()], part[part["draw"].isna()]
            matrix, role, dose = treatment[by].iloc[0]
            whole = "all weights" if dose == "replace" else "all matrices"
            names.append({"": PATHWAYS.get(role, whole), "rest": "rest of the weights"}.get(matrix, matrix))
            if len(controls):
                heights = place + 0.25 + _offsets(len(controls), 0.08)
                axis.plot(controls["value"], heights, ".", ms=3, mew=0, color="0.6", label="rotated")
            axis.errorbar(
                treatment["value"],
                [place],
                xerr=treatment["stderr"].astype(float).fillna(0),
                fmt="o",
                ms=4,
                elinewidth=0.7,
                color=COLOURS.get(matrix, ROLES[role]),
                mfc=None if p.get((matrix, role, dose), 1.0) <= LEVEL else "white",
            )
        for _, row in table[table["quantity"] == f"{MARGIN}_interaction"].iterrows():
            axis.errorbar(
                row["value"], len(names), xerr=row["stderr"], fmt="D", ms=4, elinewidth=0.7, color="0.1"
            )
            names.append("interaction")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top
        axis.set_xlabel("change of the preference margin\nfrom the base (nats/pair)")
        _legend(figure, {"": axis}, _significances("rotated"))
    return figure


def _groups(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Matrix and role of every group: all matrices, pathways, single kinds, then mixtures."""
    groups = list(dict.fromkeys(zip(rows["matrix"], rows["role"], strict=True)))
    matrices, roles = ["", "rest", *COLOURS], list(ROLES)
    return sorted(
        groups,
        key=lambda group: (
            matrices.index(group[0]) if group[0] in matrices else len(matrices),
            roles.index(group[1]),
        ),
    )


def _of(table: pd.DataFrame, effect: str) -> pd.DataFrame:
    """Rows of the effect in all arms with a dose."""
    rows = table[table["quantity"] == effect]
    rows = rows[(rows["dose"] != "") & (rows["against"] == "")]
    if not len(rows):
        raise KeyError(f"no effect {effect!r} in the table; it has {sorted(set(table['quantity']))}")
    return rows


def _panels(rows: pd.DataFrame, height: float) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one panel per matrix, in the order of the colours, two in a row."""
    matrices = [matrix for matrix in COLOURS if matrix in set(rows["matrix"])]
    across = min(2, len(matrices))
    down = ceil(len(matrices) / across)
    size = (3.25 * across, 0.5 + height * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(matrices) :]:
        axis.remove()
    return figure, dict(zip(matrices, axes.flat, strict=False))


def _floor(treatment: pd.Series, controls: pd.Series) -> float:
    """The smallest positive value of the treatment and of nearly all controls; 0 if there is none."""
    least = [treatment[treatment > 0].min(), controls[controls > 0].quantile(0.05)]
    return 0.0 if np.isnan(least).all() else float(np.nanmin(least))


def _log(axis: Axes, floor: float) -> None:
    """Make y logarithmic from the floor, or linear from 0 if no effect is positive."""
    if floor:
        axis.set_yscale("log")
    axis.set_ylim(bottom=floor)


def _bars(axis: Axes, x: pd.Series | pd.Index, rows: pd.DataFrame, colour: str) -> None:
    """Draw ± one standard error around the values of the rows, if it is known."""
    error = rows["stderr"].astype(float).fillna(0)
    axis.errorbar(x, rows["value"], error, fmt="none", elinewidth=0.7, color=colour)


def _strip(axis: Axes, kind: str, controls: pd.DataFrame) -> None:
    """Draw every control of one kind near its layer's tick, and the median of the random ones."""
    name, marker, grey, shift = CONTROLS[kind]
    x = controls["layer"].astype(float) + shift
    for places in controls.groupby("layer").groups.values():
        x.loc[places] += _offsets(len(places), 0.1)
    edge = 0.6 if marker in "x+" else 0
    axis.plot(x, controls["value"], marker, ms=3, mew=edge, color=grey, label=name, clip_on=False, zorder=3)
    if kind == "random":
        middle = controls.groupby("layer")["value"].median()
        layers = middle.index.astype(float)
        axis.hlines(middle, layers - 0.15, layers + 0.15, color="0.3", lw=1, label="random, median", zorder=3)


def _offsets(number: int, width: float) -> np.ndarray:
    """Evenly spaced offsets of `number` points, within ± `width`."""
    return np.linspace(-width, width, number) if number > 1 else np.zeros(number)


def _significance(p: pd.Series) -> str:
    """A sentence on the layers in which the treatment is not significant against the random controls."""
    above = p[p > LEVEL]
    if not len(p):
        return "no p-values"
    if len(above) in (0, len(p)):
        return f"p {'>' if len(above) else '≤'} {LEVEL} in every layer"
    if len(above) > 3:
        return f"p > {LEVEL} in {len(above)} of {len(p)} layers"
    return f"p > {LEVEL}: layer " + ", ".join(f"{layer} ({value:.2g})" for layer, value in above.items())


def _least(part: pd.DataFrame) -> list[str]:
    """A sentence on the layers in which the bottom controls do not do least; empty without such controls."""
    if "bottom" not in set(part["treatment"]):
        return []
    sizes = (
        part.assign(kind=part["treatment"].where(part["draw"].notna(), ""))
        .groupby(["layer", "kind"])["value"]
        .median()
        .unstack()
    )
    others = sizes.drop(columns="bottom").min(axis=1)
    more = sizes.index[sizes["bottom"] >= others]  # False for a layer without a bottom control (NaN)
    if not len(more):
        return ["bottom does least in every layer"]
    if len(more) > 3:
        return [f"bottom does not do least in {len(more)} of {len(sizes)} layers"]
    return [f"bottom does not do least: layer {', '.join(str(layer) for layer in more)}"]


def _label(axes: dict[str, Axes], effect: str, rows: pd.DataFrame, over: str = "") -> None:
    """Label the first panel of every row with the quantity and its unit."""
    name, unit = EFFECTS.get(effect, effect.replace("_", " ")), rows["unit"].iloc[0]
    absolute = "" if effect == "kl_from_unedited" else "absolute "
    for axis in axes.values():
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(f"{absolute}{name} ({unit}){over}")


def _legend(figure: Figure, axes: dict[str, Axes], more: Sequence[Artist] = ()) -> None:
    """One legend below all panels, with one entry per label, treatments first."""
    entries: dict[str, Artist] = {}
    for axis in axes.values():
        handles, names = axis.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    entries |= {str(handle.get_label()): handle for handle in more}
    names = sorted(entries, key=lambda name: ": " not in name)
    lines = ceil(len(names) / (2 if figure.get_figwidth() < 4 else 4))
    figure.legend(
        [entries[name] for name in names], names, loc="outside lower center", ncols=ceil(len(names) / lines)
    )


def _significances(against: str) -> list[Line2D]:
    """Legend entries of filled and open markers."""
    style = {"color": "0.1", "marker": "o", "ms": 4, "ls": ""}
    return [
        Line2D([], [], label=f"p ≤ {LEVEL} against {against}", **style),
        Line2D([], [], label=f"p > {LEVEL}, or none", mfc="white", **style),
    ]
