"""The rows of many runs as the few numbers that a reader wants: means over seeds with their intervals."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import factorial, sqrt
from typing import TYPE_CHECKING

import numpy as np

from weightgeom.analysis.comparisons import comparisons
from weightgeom.analysis.declared import EARLIER, in_section
from weightgeom.analysis.settings import SETTING, placed
from weightgeom.declarations import (
    ASYMMETRY,
    BEHAVIOUR,
    EDITS,
    MECHANISM,
    SECTIONS,
    SURGERY,
    UNCERTAINTY,
    Declaration,
    InterventionDeclaration,
)
from weightgeom.table import at_own_subspaces, label, of_matrices, of_the_model

if TYPE_CHECKING:
    import pandas as pd

MATRIX = [*SETTING, "role", "matrix", "k"]
LEVEL = 0.05  # of significance
EXACT = 8  # rows up to which the p-value of a rank correlation counts all orders
EXPECTED = ("predicted", "mean", "forecast")


@dataclass(frozen=True)
class Other:
    """A table that belongs to no section about the papers, or is a further one of it.

    `means` has a row for every setting and matrix, over runs and at the last step: of a probe its headline
    (or all quantities without a matrix), of an intervention none. `runs` has the same for every run; for an
    intervention, its comparisons (`effects`).
    """

    table: str
    declaration: Declaration
    means: "pd.DataFrame"
    runs: "pd.DataFrame"

    @property
    def section(self) -> str:
        """The heading; a further table of a section about the papers has its own name."""
        heading = self.declaration.section
        return self.table if not heading or heading in SECTIONS else heading


@dataclass(frozen=True)
class Condensed:
    """The tables of a report; see the function of each."""

    rows: "pd.DataFrame"  # placed
    ended: "pd.DataFrame"  # by_run, at the last step
    asymmetry: "pd.DataFrame"  # over_seeds, at the last step
    trajectory: "pd.DataFrame"  # over_seeds, at every step
    graded: "pd.DataFrame"
    mechanism: "pd.DataFrame"
    correlations: "pd.DataFrame"
    rank1: "pd.DataFrame"  # effects
    surgery: "pd.DataFrame"
    least: "pd.DataFrame"
    behaviour: "pd.DataFrame"
    names: Mapping[str, str]  # of the tables that the sections about the papers are made of
    others: Sequence["Other"] = ()

    @property
    def tables(self) -> "dict[str, pd.DataFrame]":
        """All but the rows, by the names of their files."""
        return {
            "ratios_by_run": self.ended,
            "asymmetry": self.asymmetry,
            "trajectory": self.trajectory,
            "graded_control": self.graded,
            "mechanism": self.mechanism,
            "mechanism_correlations": self.correlations,
            "rank1": self.rank1,
            "rank1_bottom": self.least,
            "surgery": self.surgery,
            "behaviour": self.behaviour,
            **{other.table: other.runs for other in self.others},
        }


def condense(
    rows: "pd.DataFrame", runs: "pd.DataFrame", declarations: Mapping[str, Declaration] = EARLIER
) -> Condensed:
    """All tables of the rows that `collect` gives, the runs they are of, and the declarations of tables."""
    rows = placed(rows, runs)
    there = {name: made for name, made in declarations.items() if (rows["table"] == name).any()}
    counts = rows.groupby("table")["run_id"].nunique()  # of several instances, the one of most runs
    names = {
        section: max(in_section(there, section), key=lambda name: counts[name], default="")
        for section in SECTIONS
    }
    by_layer = ratios(rows, names[ASYMMETRY])
    ended, points = by_run(at_end(by_layer)), mechanism(rows, names[MECHANISM])
    return Condensed(
        rows=rows,
        ended=ended,
        asymmetry=over_seeds(ended),
        trajectory=over_seeds(by_run(by_layer), at_steps=True),
        graded=graded(ended, runs),
        mechanism=points,
        correlations=correlations(points),
        rank1=effects(rows, names[EDITS]),
        surgery=effects(rows, names[SURGERY]),
        least=least(rows, names[EDITS]),
        behaviour=behaviour(rows, names[BEHAVIOUR]),
        names=names,
        others=[
            other
            for name, declaration in there.items()
            if name not in names.values() and (declaration.generic or declaration.section in SECTIONS)
            if declaration.section != UNCERTAINTY
            if len((other := condensed(rows, name, declaration)).runs)
        ],
    )


def condensed(rows: "pd.DataFrame", table: str, declaration: Declaration) -> Other:
    """The headline of a probe's table, or the comparisons of an intervention's, over the runs of a study."""
    if isinstance(declaration, InterventionDeclaration):
        compared = effects(rows, table)
        return Other(table, declaration, compared.iloc[:0], compared)
    part = rows[rows["table"] == table]
    headline = of_matrices(part, declaration.headline) if declaration.headline else of_the_model(part)
    last = headline.groupby(["run_id", "trajectory", "setting"])["step"].transform("max")
    keys = ["setting", "trajectory", "role", "matrix", "quantity", "unit"]
    grouped = headline[headline["step"] == last].groupby([*keys, "replicate", "run_id"], sort=False)["value"]
    single = grouped.mean().reset_index()
    return Other(table, declaration, _means(single, keys), single)


def _means(single: "pd.DataFrame", keys: Sequence[str]) -> "pd.DataFrame":
    """Means over runs with their 95 % interval, Student's t over seeds; no interval of a single run."""
    import pandas as pd

    found = []
    for key, part in single.groupby(keys, sort=False):
        value = part["value"].mean()
        half = half_width(part["value"].std(), len(part))
        ends = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
        found.append({**dict(zip(keys, key, strict=True)), "value": value, **ends, "runs": len(part)})
    table = pd.DataFrame(found, columns=[*keys, "value", "low", "high", "runs"])
    return table.astype({"low": "Float64", "high": "Float64"})


def ratios(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """A row for every run, step, matrix and layer: its `ratio` at the smallest k, and its nulls.

    `joint_sd` and `pathway_sd` are the joint null's, of the means over the matrix's layers and its pathway.
    """
    wanted = ["ratio", "null_ratio_mean", "null_ratio_sd", "q_value", "matched_ratio"]
    mine = rows[rows["table"] == table]
    part = at_own_subspaces(mine[mine["quantity"].isin(wanted)])
    part = part[part["k"] == part.groupby("run_id")["k"].transform("min")]
    keys = ["setting", *MATRIX, "base", "replicate", "run_id", "step", "layer"]
    wide = part.set_index([*keys, "quantity"])["value"].unstack().reindex(columns=wanted).reset_index()
    joint = mine[mine["quantity"] == "ratio_mean_null_sd"].rename(columns={"value": "joint_sd"})
    keys = ["setting", *MATRIX, "run_id", "step"]
    wide = wide.merge(joint[[*keys, "joint_sd"]], "left", keys)
    pathway = joint[joint["matrix"] == ""].rename(columns={"joint_sd": "pathway_sd"})
    keys.remove("matrix")
    return wide.merge(pathway[[*keys, "pathway_sd"]], "left", keys).rename_axis(columns=None)


def at_end(by_layer: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of the last step of every run's trajectory, or of each of its comparisons of stages."""
    last = by_layer.groupby(["run_id", "trajectory", "setting"])["step"].transform("max")
    return by_layer[by_layer["step"] == last]


def by_run(by_layer: "pd.DataFrame") -> "pd.DataFrame":
    """A row for every run, step and matrix, and for every pathway with matrix "": the mean over layers.

    `null_sd` is the joint null's standard deviation of that mean; where a table has none, the mean of the
    matrices' own, as if all varied together. `layer_sd` and `layers` are the spread of the layers' own means
    and their number; `beyond` is the share of q-values ≤ 0.05.
    """
    import pandas as pd

    whole = pd.concat([by_layer, by_layer.assign(matrix="", joint_sd=by_layer["pathway_sd"])])
    keys = ["setting", *MATRIX, "base", "replicate", "run_id", "step"]
    grouped = whole.assign(
        null_sd=whole["joint_sd"].fillna(whole["null_ratio_sd"]),
        beyond=(whole["q_value"] <= LEVEL).astype(float),
    ).groupby(keys, sort=False)
    found = grouped.agg(
        ratio=("ratio", "mean"),
        null_mean=("null_ratio_mean", "mean"),
        null_sd=("null_sd", "mean"),
        beyond=("beyond", "mean"),
        matched_ratio=("matched_ratio", "mean"),
    )
    layers = whole.groupby([*keys, "layer"], sort=False)["ratio"].mean().groupby(keys, sort=False)
    return found.assign(layer_sd=layers.std(), layers=layers.size()).reset_index()


def over_seeds(found: "pd.DataFrame", at_steps: bool = False) -> "pd.DataFrame":
    """A row for every setting and matrix: the mean over its runs with its 95 % interval, and the nulls.

    The interval is Student's over runs (`interval_over` seeds), or with a single run over its layers.
    """
    import pandas as pd

    keys = ["setting", *MATRIX, *(["step"] if at_steps else [])]
    rows = []
    for key, part in found.groupby(keys, sort=False):
        runs, layers = len(part), int(part["layers"].max())
        seeds = runs > 1
        sd, n = (part["ratio"].std(), runs) if seeds else (part["layer_sd"].iloc[0], layers)
        half = half_width(sd, n)
        mean, null_mean = part["ratio"].mean(), part["null_mean"].mean()
        null_sd = sqrt((part["null_sd"] ** 2).mean())
        rows.append({
            **dict(zip(keys, key, strict=True)),
            "ratio": mean,
            "stderr": None if half is None else sd / sqrt(n),
            "low": None if half is None else max(0.0, mean - half),
            "high": None if half is None else mean + half,
            "interval_over": ("seeds" if seeds else "layers") if half is not None else "",
            "runs": runs,
            "layers": layers,
            "null_mean": null_mean,
            "null_sd": null_sd,
            "z": (mean - null_mean) / null_sd if null_sd > 0 else None,
            "beyond": part["beyond"].mean(),
            "matched_ratio": part["matched_ratio"].mean(),
            "unit": "1",
        })  # fmt: skip
    columns = (*("stderr", "low", "high", "z", "matched_ratio"),)
    return (
        pd.DataFrame(rows).astype(dict.fromkeys(columns, "Float64")) if rows else pd.DataFrame(columns=keys)
    )


def half_width(sd: float, n: int) -> float | None:
    """Half of the 95 % interval of a mean of n values, by Student's t; None for fewer than two."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1) * sd / sqrt(n)) if n > 1 and np.isfinite(sd) else None


def graded(ended: "pd.DataFrame", runs: "pd.DataFrame") -> "pd.DataFrame":
    """A row for every run and pathway whose sharpness was measured; `run` is its setting's name.

    Trainings on the corpus are left out: the family is compared on one data set, the responses.
    """
    about = runs.set_index("run_id")
    part = ended[(ended["matrix"] == "") & (ended["trajectory"] == "training")]
    part = part[~part["run_id"].map(about["of_text"]).astype(bool)]
    part = part.assign(
        run=_without(part["setting"], part["preference"]),
        sharpness=part["run_id"].map(about["participation_ratio"]).astype(float),
        target_energy=part["run_id"].map(about["target_energy"]).astype(float),
    )
    columns = ["run", *SETTING, "replicate", "run_id", "role", "sharpness", "target_energy", "ratio"]
    return part[part["sharpness"].notna()][columns].reset_index(drop=True)


def rank_correlation(table: "pd.DataFrame") -> tuple[float, float]:
    """Spearman's of `sharpness` and `ratio`, and its two-sided p-value; 0 and 1 where either is constant.

    Up to eight rows the p-value is the share of all orders that correlate as much; beyond, it is that of
    Student's t, which is 0 for a perfect correlation, and at least the 2/n! of the two perfect orders.
    """
    from scipy.stats import rankdata, spearmanr

    sharpness, ratio = rankdata(table["sharpness"]), rankdata(table["ratio"])
    if min(len(set(sharpness)), len(set(ratio))) < 2:
        return 0.0, 1.0
    found = spearmanr(sharpness, ratio)
    n, statistic = len(table), float(found.statistic)
    if n > EXACT:
        return statistic, max(float(found.pvalue), 2 / factorial(n))
    centred = sharpness - sharpness.mean()
    orders = np.array(list(permutations(ratio - ratio.mean()))) @ centred
    reached = abs(float((ratio - ratio.mean()) @ centred))
    return statistic, float((np.abs(orders) >= reached - 1e-9).mean())


def _without(settings: "pd.Series", preferences: "pd.Series") -> "list[str]":
    """The settings' names without their preference, which a figure names once."""
    pairs = zip(settings, preferences, strict=True)
    return [name.replace(f" · {preference}", "") for name, preference in pairs]


def mechanism(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """A row for every run, layer and matrix: the ratio that the base led to expect, and the measured one."""
    part = rows[rows["table"] == table]
    part = part[part["step"] == part.groupby("run_id")["step"].transform("max")]
    part = part[part["k"] == part.groupby("run_id")["k"].transform("min")]
    wanted = [f"{one}_ratio" for one in (*EXPECTED, "measured")]
    part = part[part["quantity"].isin(wanted)]
    part = part.assign(matrix=label(part))
    keys = ["setting", *MATRIX, "replicate", "run_id", "layer"]
    wide = part.set_index([*keys, "quantity"])["value"].unstack().reindex(columns=wanted)
    return wide[wide["measured_ratio"].notna()].reset_index().rename_axis(columns=None)


def correlations(points: "pd.DataFrame") -> "pd.DataFrame":
    """Pearson's correlation of every expectation with the measured ratio, by model, data and pathway.

    Over all runs, layers and matrices; `low` and `high` are Fisher's 95 % interval, which takes the `n`
    points for independent. Where a correlation is not defined there is no row.
    """
    import pandas as pd
    from scipy.stats import pearsonr

    rows = []
    for (model, data, role), part in points.groupby(["model", "data", "role"]):
        for name in EXPECTED:
            pair = part[[f"{name}_ratio", "measured_ratio"]].dropna()
            if len(pair) < 4 or not (pair.std() > 0).all():
                continue
            found = pearsonr(*pair.to_numpy(float).T)
            low, high = found.confidence_interval(0.95)
            place = {"model": model, "data": data, "role": role, "expected": name}
            rows.append({
                **place, "correlation": float(found.statistic), "low": float(low), "high": float(high),
                "unit": "1", "n": len(pair), "runs": part["run_id"].nunique(),
            })  # fmt: skip
    columns = ["model", "data", "role", "expected", "correlation", "low", "high", "unit", "n", "runs"]
    return pd.DataFrame(rows, columns=columns)


def effects(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """All comparisons of an intervention with its controls, over runs; `quantity` names the effect."""
    import pandas as pd

    part, found = rows[rows["table"] == table], []
    for key, one in part.groupby(["setting", *SETTING, "replicate", "run_id"], sort=False):
        for p_value in sorted(one.loc[one["quantity"].str.endswith("_p_value"), "quantity"].unique()):
            effect = p_value.removesuffix("_p_value")
            columns = dict(zip(["setting", *SETTING, "replicate", "run_id"], key, strict=True))
            unit = one.loc[one["quantity"] == effect, "unit"].iloc[0]
            n = one.loc[one["quantity"] == p_value, "n"].to_numpy()  # in the order of the comparisons
            found.append(comparisons(one, effect).assign(**columns, quantity=effect, unit=unit, n=n))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def least(rows: "pd.DataFrame", table: str, effect: str = "kl_from_unedited") -> "pd.DataFrame":
    """A row for every run, layer and matrix of rank-1 edits, at the largest dose: does `bottom` do least?

    Which is when the median of its absolute effects lies below that of every other arm.
    """
    part = rows[(rows["table"] == table) & (rows["quantity"] == effect)]
    part = part.assign(size=part["value"].abs(), strength=part["dose"].astype(float))
    part = part[part["strength"] == part.groupby("run_id")["strength"].transform("max")]
    keys = ["setting", *SETTING, "replicate", "run_id", "role", "matrix", "layer"]
    sizes = part.groupby([*keys, "treatment"])["size"].median().unstack()
    if "bottom" not in sizes:
        return sizes.iloc[:0].reset_index()
    sizes = sizes[sizes["bottom"].notna()]
    others = sizes.drop(columns="bottom").min(axis=1)
    found = sizes[["bottom"]].assign(others=others, least=sizes["bottom"] < others)
    return found.reset_index().rename_axis(columns=None)


def behaviour(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """What every training achieved: each quantity before and after, as means over its runs."""
    part = rows[(rows["table"] == table) & (rows["trajectory"] == "training")]
    keys = ["setting", *SETTING, "quantity", "unit"]
    ends = {}
    for name, pick in (("before", "min"), ("after", "max")):
        step = part.groupby(["run_id", "setting"])["step"].transform(pick)
        ends[name] = part[part["step"] == step].groupby(keys, sort=False)["value"].mean()
    n = part.groupby(keys, sort=False)["n"].max()
    runs = part.groupby(keys, sort=False)["run_id"].nunique()
    found = ends["before"].to_frame("before").assign(after=ends["after"], prompts=n, runs=runs)
    return found.reset_index()
