"""The rows of many runs as the few numbers that a reader wants: means over seeds with their intervals."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from weightgeom.analysis.comparisons import comparisons
from weightgeom.analysis.declared import EARLIER, in_section
from weightgeom.analysis.evidence import Evidence, correlation_over_runs, without_copies
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
EXPECTED = (
    *("predicted", "mean", "mixture"),
    *("forecast", "forecast_adam", "forecast_kronecker", "forecast_adapter"),
)
OWN = "own_forecast"  # the forecast that belongs to the optimizer of each training
MEASURES = {
    "alternatives": "the effective number of alternatives",
    "participation_ratio": "the participation ratio of the logit gradient",
}


@dataclass(frozen=True)
class Other:
    """A table that belongs to no section about the papers, or is a further one of a section.

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
    increments: "pd.DataFrame"  # of pretrainings
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
            "pretraining_increments": self.increments,
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
    ended, points = by_run(at_end(by_layer)), mechanism(rows, runs, names[MECHANISM])
    return Condensed(
        rows=rows,
        ended=ended,
        asymmetry=over_seeds(ended),
        trajectory=over_seeds(by_run(by_layer), at_steps=True),
        graded=graded(ended, runs),
        increments=increments(rows, names[ASYMMETRY]),
        mechanism=points,
        correlations=correlations(points),
        rank1=matched(effects(rows, names[EDITS]), runs, names[EDITS]),
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

    means = []
    for key, part in single.groupby(keys, sort=False):
        value = part["value"].mean()
        half = half_width(part["value"].std(), len(part))
        ends = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
        means.append({**dict(zip(keys, key, strict=True)), "value": value, **ends, "runs": len(part)})
    table = pd.DataFrame(means, columns=[*keys, "value", "low", "high", "runs"])
    return table.astype({"low": "Float64", "high": "Float64"})


def ratios(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """A row for every run, step, layer and matrix: its `ratio` at the smallest k, and its nulls.

    `joint_sd` and `pathway_sd` are the joint null's, of the means over the matrix's layers and its pathway.
    """
    wanted = ["ratio", "null_ratio_mean", "null_ratio_sd", "q_value", "matched_ratio"]
    wanted += ["crossfit_ratio", "crossfit_matched_ratio", "adapter_rank"]
    mine = rows[rows["table"] == table]
    part = at_own_subspaces(mine[mine["quantity"].isin(wanted)])
    part = part[part["k"] == part.groupby("run_id")["k"].transform("min")]
    keys = ["setting", *MATRIX, "base", "replicate", "run_id", "step", "layer", "expert"]
    part = part.assign(expert=part["expert"].fillna(-1))
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
    ratios_by_run = grouped.agg(
        ratio=("ratio", "mean"),
        null_mean=("null_ratio_mean", "mean"),
        null_sd=("null_sd", "mean"),
        beyond=("beyond", "mean"),
        matched_ratio=("matched_ratio", "mean"),
        crossfit_ratio=("crossfit_ratio", "mean"),
        crossfit_matched_ratio=("crossfit_matched_ratio", "mean"),
        adapter_rank=("adapter_rank", "max"),
    )
    layers = whole.groupby([*keys, "layer"], sort=False)["ratio"].mean().groupby(keys, sort=False)
    return ratios_by_run.assign(layer_sd=layers.std(), layers=layers.size()).reset_index()


def over_seeds(ratios_by_run: "pd.DataFrame", at_steps: bool = False) -> "pd.DataFrame":
    """A row for every setting and matrix: the mean over its runs with its 95 % interval, and the nulls.

    The interval is Student's over runs; a single run has none. `layer_sd` is the spread of the layers' means,
    which is no error of the mean.
    """
    import pandas as pd

    keys = ["setting", *MATRIX, *(["step"] if at_steps else [])]
    rows = []
    for key, part in ratios_by_run.groupby(keys, sort=False):
        runs, sd = len(part), part["ratio"].std()
        half = half_width(sd, runs)
        mean, null_mean = part["ratio"].mean(), part["null_mean"].mean()
        null_sd = sqrt((part["null_sd"] ** 2).mean())
        rows.append({
            **dict(zip(keys, key, strict=True)),
            "ratio": mean,
            "stderr": None if half is None else sd / sqrt(runs),
            "low": None if half is None else max(0.0, mean - half),
            "high": None if half is None else mean + half,
            "runs": runs,
            "layers": int(part["layers"].max()),
            "layer_sd": part["layer_sd"].mean(),
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
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975) * sd / sqrt(n)) if n > 1 and np.isfinite(sd) else None


def graded(ended: "pd.DataFrame", runs: "pd.DataFrame") -> "pd.DataFrame":
    """A row for every run and pathway whose sharpness was measured; `run` is its setting's name.

    `sharpness` is the effective number of alternatives, or the participation ratio where a run of the study
    has no such number; `measure` says which. Trainings on the corpus are left out: the family is compared on
    one data set, the responses. Of copies of a training the first counts.
    """
    about = runs.set_index("run_id")
    part = ended[(ended["matrix"] == "") & (ended["trajectory"] == "training")]
    part = part[~part["run_id"].map(about["of_text"]).astype(bool)]
    part = part.assign(
        run=_without(part["setting"], part["preference"]),
        **{
            name: part["run_id"].map(about[name]).astype(float)
            for name in ("participation_ratio", "target_energy", "alternatives")
        },
    )
    part = part[part["participation_ratio"].notna()]
    measure = "participation_ratio" if part["alternatives"].isna().any() else "alternatives"
    part = part.assign(sharpness=part[measure], measure=MEASURES[measure])
    part = without_copies(part, ["ratio", "null_sd"], ["role"])
    columns = ["run", *SETTING, "replicate", "run_id", "role", "sharpness", "measure"]
    return part[[*columns, "target_energy", "ratio"]].reset_index(drop=True)


def _without(settings: "pd.Series", preferences: "pd.Series") -> "list[str]":
    """The settings' names without their preference, which a figure names once."""
    pairs = zip(settings, preferences, strict=True)
    return [name.replace(f" · {preference}", "") for name, preference in pairs]


def increments(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """A row for every pretraining: the write ratio of its increments, the mean over them and matrices.

    Each is compared with the prediction subspace of the checkpoint before; the first, whose subspace is that
    of random weights, is left out.
    """
    part = rows[(rows["table"] == table) & (rows["quantity"] == "forward_increment_ratio")]
    part = part[(part["trajectory"] == "pretraining") & (part["role"] == "write")]
    part = part[part["k"] == part.groupby("run_id")["k"].transform("min")]
    part = part[part["step"] > part.groupby("run_id")["step"].transform("min")]
    keys = ["setting", *SETTING, "base", "run_id"]
    ratios_by_run = part.groupby(keys, sort=False).agg(
        ratio=("value", "mean"), increments=("step", "nunique")
    )
    return ratios_by_run.reset_index()


def mechanism(rows: "pd.DataFrame", runs: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """A row for every run, layer and matrix: the ratio that the base led to expect, and the measured one.

    `own_forecast_ratio` is the forecast that belongs to the training's optimizer, by the column `treatment`;
    that of the plain mean gradient in tables that do not say which. `design` says what the runs share. Of
    copies of a training the first counts.
    """
    part = rows[rows["table"] == table]
    part = part[part["step"] == part.groupby("run_id")["step"].transform("max")]
    part = part[part["k"] == part.groupby("run_id")["k"].transform("min")]
    wanted = [f"{name}_ratio" for name in (*EXPECTED, "measured")]
    part = part[part["quantity"].isin(wanted)]
    part = part.assign(matrix=label(part))
    keys = ["setting", *MATRIX, "replicate", "run_id", "layer"]
    wide = part.set_index([*keys, "quantity"])["value"].unstack().reindex(columns=wanted)
    named = part[part["treatment"] != ""].set_index(keys)
    own = named[named["quantity"] != "measured_ratio"]["value"].reindex(wide.index)
    unnamed = ~wide.index.isin(named.index)
    wide[f"{OWN}_ratio"] = own.where(~unnamed, wide["forecast_ratio"])
    points = wide[wide["measured_ratio"].notna()].reset_index().rename_axis(columns=None)
    points = points.assign(design=points["run_id"].map(runs.set_index("run_id")["design"]))
    return without_copies(points, ["measured_ratio"], ["layer", "matrix"]).reset_index(drop=True)


def expectation(points: "pd.DataFrame", name: str) -> Evidence | None:
    """The correlation of one expectation with the measured ratio, with its interval over trainings."""
    pair = points[["run_id", f"{name}_ratio", "measured_ratio"]].dropna()
    x, y = (pair[column].to_numpy(float) for column in (f"{name}_ratio", "measured_ratio"))
    return correlation_over_runs(x, y, list(pair["run_id"]))


def correlations(points: "pd.DataFrame") -> "pd.DataFrame":
    """Pearson's correlation of every expectation with the measured ratio, by design and pathway.

    Over all runs, layers and matrices; `low` and `high` are the jackknife's 95 % interval over runs, missing
    with fewer than three of them. Where a correlation is not defined there is no row.
    """
    import pandas as pd

    keys = ["model", "data", "role"]
    rows = []
    groups = points.groupby([*(["design"] if "design" in points else []), *keys], sort=False)
    for key, part in groups:
        for name in EXPECTED:
            pair = part[[f"{name}_ratio", "measured_ratio"]].dropna()
            if len(pair) < 4 or not (pair.std() > 0).all():
                continue
            made = expectation(part, name)
            ends = {"low": None, "high": None} if made is None else {"low": made.low, "high": made.high}
            rows.append({
                **dict(zip(keys, key[-3:], strict=True)), "expected": name,
                "correlation": float(pair.corr().iloc[0, 1]), **ends,
                "unit": "1", "n": len(pair), "runs": part["run_id"].nunique(),
            })  # fmt: skip
    columns = ["model", "data", "role", "expected", "correlation", "low", "high", "unit", "n", "runs"]
    return pd.DataFrame(rows, columns=columns).astype({"low": "Float64", "high": "Float64"})


def matched(effects: "pd.DataFrame", runs: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """The effects with a column `match`: controls share the `frobenius` norm or the `output` energy."""
    matches = runs.set_index("run_id")["matches"]
    of_run = {
        run: dict(pair.split("=", 1) for pair in text.split(", ") if pair).get(table, "frobenius")
        for run, text in matches.items()
    }
    return effects.assign(match=effects["run_id"].map(of_run)) if len(effects) else effects


def effects(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """All comparisons of an intervention with its controls, over runs; `quantity` names the effect."""
    import pandas as pd

    part, compared = rows[rows["table"] == table], []
    for key, run_rows in part.groupby(["setting", *SETTING, "replicate", "run_id"], sort=False):
        for p_value in sorted(
            run_rows.loc[run_rows["quantity"].str.endswith("_p_value"), "quantity"].unique()
        ):
            effect = p_value.removesuffix("_p_value")
            columns = dict(zip(["setting", *SETTING, "replicate", "run_id"], key, strict=True))
            unit = run_rows.loc[run_rows["quantity"] == effect, "unit"].iloc[0]
            n = run_rows.loc[
                run_rows["quantity"] == p_value, "n"
            ].to_numpy()  # in the order of the comparisons
            compared.append(comparisons(run_rows, effect).assign(**columns, quantity=effect, unit=unit, n=n))
    return pd.concat(compared, ignore_index=True) if compared else pd.DataFrame()


def least(rows: "pd.DataFrame", table: str, effect: str = "kl_from_unedited") -> "pd.DataFrame":
    """A row for every run, layer and matrix of rank-1 edits, at the largest dose: does `bottom` do least?

    Which is when the median of its absolute effects lies below that of every other arm.
    """
    part = rows[(rows["table"] == table) & (rows["quantity"] == effect)]
    part = part.assign(size=part["value"].abs(), strength=part["dose"].astype(float))
    part = part[part["strength"] == part.groupby("run_id")["strength"].transform("max")]
    keys = ["setting", *SETTING, "replicate", "run_id", "role", "matrix", "layer"]
    sizes = part.groupby([*keys, "treatment"])["size"].median().unstack()
    sizes = sizes.reindex(columns=sorted({*sizes.columns, "bottom"}))
    sizes = sizes[sizes["bottom"].notna()]  # none without that control
    others = sizes.drop(columns="bottom").min(axis=1)
    compared = sizes[["bottom"]].assign(others=others, least=sizes["bottom"] < others)
    return compared.reset_index().rename_axis(columns=None)


def behaviour(rows: "pd.DataFrame", table: str) -> "pd.DataFrame":
    """The behaviour of every training: each quantity before and after, as means over its runs."""
    part = rows[(rows["table"] == table) & (rows["trajectory"] == "training")]
    keys = ["setting", *SETTING, "quantity", "unit"]
    ends = {}
    for name, pick in (("before", "min"), ("after", "max")):
        step = part.groupby(["run_id", "setting"])["step"].transform(pick)
        ends[name] = part[part["step"] == step].groupby(keys, sort=False)["value"].mean()
    n = part.groupby(keys, sort=False)["n"].max()
    runs = part.groupby(keys, sort=False)["run_id"].nunique()
    achieved = ends["before"].to_frame("before").assign(after=ends["after"], prompts=n, runs=runs)
    return achieved.reset_index()
