"""The tables of a report's page, as text: numbers with their units, intervals and n."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runners.report.uncertainty import COUPLINGS, Companion
from weightgeom.analysis.over_seeds import Condensed, Other
from weightgeom.declarations import InterventionDeclaration
from weightgeom.table import given_name

if TYPE_CHECKING:
    import pandas as pd

    from runners.report.read import Study

ORDER = (
    *("q", "q_a", "k", "kv_a", "k_rope", "v", "router", "gate", "up", "shared_gate", "shared_up"),
    *("o", "down", "shared_down"),
)
NUMBERS = ("before", "after", "change", "read", "write")
BRIDGED = ("before (1)", "after (1)", "change (1)", "read ratio (1)", "write ratio (1)")
NULL, BEYOND = "null ±\u00a02\u00a0sd", "q\u00a0≤\u00a00.05"


@dataclass(frozen=True)
class Shown:
    """A table as text: its columns, which of them are numbers, and its rows."""

    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[str]]


def shown_tables(study: "Study", condensed: Condensed, uncertainty: Companion | None) -> dict[str, Shown]:
    """The tables of the page by name; those that no run measured are left out."""
    shown = {"settings": _settings(study, condensed), "runs": _runs(study)}
    if study.sweeps:
        shown["sweeps"] = _sweeps(study)
    if len(condensed.asymmetry):
        shown |= {"asymmetry": _pathways(condensed), "matrices": _matrices(condensed)}
    if len(condensed.behaviour):
        shown["behaviour"] = _behaviour(condensed)
    if len(condensed.correlations):
        shown["mechanism"] = _correlations(condensed)
    for name, table in {"rank1": condensed.rank1, "surgery": condensed.surgery}.items():
        if len(table):
            shown[name] = _comparisons(table)
    for other in condensed.others:
        shown[f"table {other.table}"] = _other(other)
    if uncertainty is not None and len(uncertainty.bridge):
        shown["bridge"] = _bridge(uncertainty.bridge)
    return shown


def _bridge(rows: "pd.DataFrame") -> Shown:
    """A row for every training, group and coupling: the means over layers, and over seeds."""
    keys = ["run", "arm", "quantity"]
    ratios = rows.groupby([*keys, "role"])["rsf"].mean().unstack()
    changes = rows.groupby(keys, sort=False)[["before", "after", "change"]].mean().join(ratios)
    seeds = rows.groupby(keys)["run_id"].nunique()
    lines = [
        [
            run,
            arm,
            COUPLINGS[quantity],
            *(_number(row.get(name)) for name in NUMBERS),
            str(seeds[run, arm, quantity]),
        ]
        for (run, arm, quantity), row in changes.iterrows()
    ]
    columns = ("trained by", "groups", "coupling of the boundary", *BRIDGED, "runs")
    return Shown(columns, (False, False, False, *[True] * 6), lines)


def _settings(study: "Study", condensed: Condensed) -> Shown:
    """A row for every setting: its parts, its seeds and its code."""
    about = study.runs.set_index("run_id")
    rows = []
    for setting, part in condensed.rows.groupby("setting", sort=False):
        runs = about.loc[part["run_id"].unique()]
        first = part.iloc[0]
        trained = first["trajectory"] == "training"
        steps = part.groupby("run_id")["step"].max()
        commits = dict.fromkeys(_commit(row) for _, row in runs.iterrows())
        seeds = sorted(runs["seed"].unique()) if trained else [_base(base) for base in part["base"].unique()]
        rows.append([
            setting, first["model"], ", ".join(dict.fromkeys(runs["data_set"])) or first["data"],
            _range(steps), ", ".join(str(seed) for seed in seeds), str(len(runs)), ", ".join(commits),
        ])  # fmt: skip
    columns = ("setting", "model", "data", "steps", "seeds", "runs", "commit")
    return Shown(columns, (False, False, False, True, True, True, False), rows)


def _base(seeds: str) -> str:
    """The name of the seeds of a base, MODEL/DATA; a downloaded one has none."""
    names = zip(("model", "data"), seeds.split("/"), strict=True)
    return " ".join(f"{name} {seed}" for name, seed in names if seed.isdigit()) or "-"


def _runs(study: "Study") -> Shown:
    rows = [
        [
            row["experiment"], row["run_name"], row["run_id"][:8], row["started"].strftime("%Y-%m-%d %H:%M"),
            f"{row['minutes']:.1f}", _commit(row), row["code"], row["libraries"], row["host"],
        ]
        for _, row in study.runs.iterrows()
    ]  # fmt: skip
    columns = ("experiment", "run", "id", "started (UTC)", "minutes", "commit", "code", "libraries", "host")
    return Shown(columns, (False, False, False, False, True, False, False, False, False), rows)


def _sweeps(study: "Study") -> Shown:
    """A row for every sweep under SLURM: its hours, those lost, and its peak memory."""
    keys = ("slurm_hours", "slurm_lost_hours", "slurm_peak_memory_gib")
    rows = [[name, *(tags.get(key, "-") for key in keys)] for name, tags in study.sweeps]
    return Shown(("sweep", "hours", "lost hours", "peak memory (GiB)"), (False, True, True, True), rows)


def _commit(row: "pd.Series") -> str:
    name = row["commit"][:9] or "no commit"
    return name + (" + uncommitted changes" if row["uncommitted_changes"] else "")


def _pathways(condensed: Condensed) -> Shown:
    """A row for every setting: read and write side by side."""
    table = condensed.asymmetry[condensed.asymmetry["matrix"] == ""]
    writes = table[table["role"] == "write"].set_index("setting")["ratio"].to_dict()
    rows = []
    for setting in sorted(
        dict.fromkeys(table["setting"]), key=lambda name: writes.get(name, 0.0), reverse=True
    ):
        sides = table[table["setting"] == setting].set_index("role")
        cells = [setting]
        for role in ("read", "write"):
            side = sides.loc[role] if role in sides.index else None
            cells += ["-"] * 3 if side is None else [
                _estimate(side["ratio"], side["low"], side["high"]), _null(side), _percent(side["beyond"]),
            ]  # fmt: skip
        rows.append([*cells, _samples(sides.iloc[0])])
    columns = ["setting"]
    for role in ("read", "write"):
        columns += [f"{role} ratio (1) [95\u00a0%]", NULL, BEYOND]
    return Shown([*columns, "over"], [False] + [True] * 6 + [False], rows)


def _matrices(condensed: Condensed) -> Shown:
    table = condensed.asymmetry[condensed.asymmetry["matrix"] != ""]
    order = {matrix: number for number, matrix in enumerate(ORDER)}
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        for _, row in part.sort_values(
            "matrix", key=lambda names: names.map(order), kind="stable"
        ).iterrows():
            rows.append([
                setting, row["role"], row["matrix"], str(row["k"]),
                _estimate(row["ratio"], row["low"], row["high"]), _null(row), _number(row["z"], ".1f"),
                _percent(row["beyond"]), _number(row["matched_ratio"]), _samples(row),
            ])  # fmt: skip
    columns = ("setting", "pathway", "matrix", "k", "ratio (1) [95\u00a0%]", NULL, "z", BEYOND,
               "matched level (1)", "over")  # fmt: skip
    return Shown(columns, [False] * 3 + [True] * 6 + [False], rows)


def _behaviour(condensed: Condensed) -> Shown:
    """A row for every setting, its quantities side by side."""
    table = condensed.behaviour
    quantities = list(dict.fromkeys(zip(table["quantity"], table["unit"], strict=True)))
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        by_name = part.set_index("quantity")
        cells = [
            f"{by_name.loc[name, 'before']:.3g} → {by_name.loc[name, 'after']:.3g}"
            if name in by_name.index
            else "-"
            for name, _ in quantities
        ]
        rows.append([str(setting), *cells, str(part["runs"].max())])
    samples = table.groupby("quantity")["prompts"].max()
    columns = [f"{name.replace('_', ' ')} ({unit}), n = {samples[name]}" for name, unit in quantities]
    return Shown(["setting", *columns, "runs"], [False] + [True] * (len(columns) + 1), rows)


def _correlations(condensed: Condensed) -> Shown:
    rows = [
        [row["model"], row["data"], row["role"], row["expected"],
         _estimate(row["correlation"], row["low"], row["high"]), str(row["n"]), str(row["runs"])]
        for _, row in condensed.correlations.iterrows()
    ]  # fmt: skip
    columns = ("model", "data", "pathway", "expected from", "correlation (1) [95\u00a0%]", "n", "runs")
    return Shown(columns, [False] * 4 + [True] * 3, rows)


def _comparisons(table: "pd.DataFrame") -> Shown:
    """Medians over places, by setting, pathway, dose, control and effect."""
    keys = ["setting", "role", "treatment", "dose", "against", "quantity", "unit"]
    if len(table):
        given = table["subspace"].map(given_name)
        table = table.assign(
            treatment=table["treatment"].where(given == "", table["treatment"] + " in " + given)
        )
    rows = []
    for key, part in table.groupby(keys, sort=False):
        beats = int((part["p_value"] <= 0.05).sum())
        rows.append([
            *key[:5], key[5].replace("_", " "), key[6], _number(part["effect"].median(), ".2g"),
            _number(part["controls"].median(), ".2g"), f"{beats} of {len(part)}",
            _range(part["n"]),
        ])  # fmt: skip
    columns = ("setting", "pathway", "edit", "dose", "against", "effect", "unit", "median",
               "controls' median", "p ≤ 0.05", "controls")  # fmt: skip
    return Shown(columns, [False] * 7 + [True] * 4, rows)


def _other(other: Other) -> Shown:
    """Means by setting and matrix, or medians of an intervention's effects over places."""
    if isinstance(other.declaration, InterventionDeclaration):
        return _comparisons(other.runs)
    form = other.declaration.form
    rows = [
        [row["setting"], row["role"] or "-", row["matrix"] or "-", row["quantity"].replace("_", " "),
         row["unit"], _estimate(row["value"], row["low"], row["high"], form), str(row["runs"])]
        for _, row in other.means.iterrows()
    ]  # fmt: skip
    columns = ("setting", "pathway", "matrix", "quantity", "unit", "mean [95\u00a0%]", "runs")
    return Shown(columns, [False] * 5 + [True] * 2, rows)


def _estimate(value: float, low: Any, high: Any, form: str = ".2f") -> str:
    import pandas as pd

    return _number(value, form) if pd.isna(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _number(value: Any, form: str = ".2f") -> str:
    import pandas as pd

    return "-" if pd.isna(value) else f"{value:{form}}"


def _null(row: "pd.Series") -> str:
    return f"{row['null_mean']:.2f} ± {2 * row['null_sd']:.2f}"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _samples(row: "pd.Series") -> str:
    return f"{row['runs']} trainings" if row["runs"] > 1 else "1 training"


def _range(values: "pd.Series") -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"
