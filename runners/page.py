"""The one page of a report, and the files beside it."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.claims import AGREES, CLAIMS, DISAGREES, UNTESTED, verdicts
from runners.condensed import Condensed, condense
from runners.illustrations import Illustration, illustrations
from runners.store import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from runners.report import Study

TEMPLATE = Path(__file__).with_name("report.html")
ORDER = ("q", "k", "v", "gate", "up", "o", "down")
# What a section says where no run measured it, and how to.
MISSING = {
    "asymmetry": ("The read and write ratios", "python run.py objective=dpo"),
    "trajectory": ("The trajectory", "python run.py experiment=trajectory"),
    "behaviour": ("What the trainings achieved", "python run.py objective=dpo 'probe=[rsf,behaviour]'"),
    "graded": ("The graded control", "python run.py experiment=graded_control -m"),
    "mechanism": ("The mechanism", "python run.py 'probe=[rsf,behaviour,moments]'"),
    "rank1": ("The rank-1 edits", "python run.py experiment=causal"),
    "surgery": ("The surgery on the update", "python run.py experiment=causal"),
}


@dataclass(frozen=True)
class Shown:
    """A table as text: its columns, which of them are numbers, and its rows."""

    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[str]]


def write(study: "Study", directory: Path) -> Path:
    """Write tables, figures and the page into `directory`, in place of an earlier report's; returns the page."""
    found = condense(study.rows, study.runs)
    judged = verdicts(found, study.runs)
    for part in ("tables", "figures"):
        shutil.rmtree(directory / part, ignore_errors=True)
    tables = {"rows": study.rows, "runs": study.runs, "claims": judged, **found.tables}
    (directory / "tables").mkdir(parents=True)
    kept = {name: table for name, table in tables.items() if len(table)}
    for name, table in kept.items():
        table.to_parquet(directory / "tables" / f"{name}.parquet")
        table.to_csv(directory / "tables" / f"{name}.csv", index=False)
    drawn = illustrations(found, directory / "figures")
    page = directory / "index.html"
    write_atomically(page, rendered(study, found, judged, drawn, list(kept)))
    return page


def rendered(
    study: "Study",
    found: Condensed,
    judged: "pd.DataFrame",
    drawn: Sequence[Illustration],
    tables: Sequence[str],
) -> str:
    """The page as HTML; everything that comes from outside is escaped."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 (slow)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = _tables(study, found)
    there = {one.section for one in drawn} | shown.keys()
    missing = {name: told for name, told in MISSING.items() if name not in there}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        names=study.names,
        tracking_uri=study.tracking_uri,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=len(study.runs),
        rows=len(study.rows),
        unfinished=study.unfinished,
        left_out=len(study.runs) - found.rows["run_id"].nunique(),
        seeds=_most_seeds(found),
        claims=[_claim(claim, judged) for claim in CLAIMS],
        tables=shown,
        variants=_variants(found),
        figures={section: [one for one in drawn if one.section == section] for section in there},
        missing=missing,
        files=tables,
    )


def _claim(claim: Any, judged: "pd.DataFrame") -> dict[str, Any]:
    lines = judged[judged["claim"] == claim.number]
    counts = {said: int((lines["verdict"] == said).sum()) for said in (AGREES, DISAGREES, UNTESTED)}
    return {
        "number": claim.number,
        "statement": claim.statement,
        "rule": claim.rule,
        "counts": {said: count for said, count in counts.items() if count},
        "lines": lines.to_dict("records"),
    }


def _tables(study: "Study", found: Condensed) -> dict[str, Shown]:
    shown = {"settings": _settings(study, found), "runs": _runs(study)}
    if len(found.asymmetry):
        shown |= {"asymmetry": _pathways(found), "matrices": _matrices(found)}
    if len(found.behaviour):
        shown["behaviour"] = _behaviour(found)
    if len(found.correlations):
        shown["mechanism"] = _correlations(found)
    for name in ("rank1", "surgery"):
        if len(table := getattr(found, name)):
            shown[name] = _comparisons(table)
    return shown


def _settings(study: "Study", found: Condensed) -> Shown:
    """A row for every setting: what it was made of, by which seeds, and from which code."""
    about = study.runs.set_index("run_id")
    rows = []
    for setting, part in found.rows.groupby("setting", sort=False):
        runs = about.loc[part["run_id"].unique()]
        first = part.iloc[0]
        trained = first["trajectory"] == "training"
        commits = dict.fromkeys(_commit(row) for _, row in runs.iterrows())
        seeds = sorted(part["replicate"].unique()) if not trained else sorted(runs["seed"].unique())
        rows.append([
            setting, first["model"], ", ".join(dict.fromkeys(runs["data_set"])) or first["data"],
            ", ".join(dict.fromkeys(runs["steps"])) if trained else "-",
            ", ".join(str(seed) for seed in seeds), str(len(runs)), ", ".join(commits),
        ])  # fmt: skip
    columns = ("setting", "model", "data", "steps", "seeds", "runs", "commit")
    return Shown(columns, (False, False, False, True, True, True, False), rows)


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


def _commit(row: "pd.Series") -> str:
    name = row["commit"][:9] or "no commit"
    return name + (" + uncommitted changes" if row["uncommitted_changes"] else "")


def _pathways(found: Condensed) -> Shown:
    """A row for every setting: read and write side by side."""
    table = found.asymmetry[found.asymmetry["matrix"] == ""]
    writes = table[table["role"] == "write"].set_index("setting")["ratio"]
    rows = []
    for setting in sorted(dict.fromkeys(table["setting"]), key=lambda name: -writes.get(name, 0.0)):
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
        columns += [f"{role} ratio (1) [95 %]", "null ± 2 sd", "q ≤ 0.05"]
    return Shown([*columns, "interval over"], [False] + [True] * 6 + [False], rows)


def _matrices(found: Condensed) -> Shown:
    table = found.asymmetry[found.asymmetry["matrix"] != ""]
    order = {matrix: number for number, matrix in enumerate(ORDER)}
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        for _, row in part.sort_values("matrix", key=lambda names: names.map(order)).iterrows():
            rows.append([
                setting, row["role"], row["matrix"], str(row["k"]),
                _estimate(row["ratio"], row["low"], row["high"]), _null(row), _number(row["z"], ".1f"),
                _percent(row["beyond"]), _number(row["matched_ratio"]), _samples(row),
            ])  # fmt: skip
    columns = ("setting", "pathway", "matrix", "k", "ratio (1) [95 %]", "null ± 2 sd", "z", "q ≤ 0.05",
               "matched level (1)", "interval over")  # fmt: skip
    return Shown(columns, [False] * 3 + [True] * 6 + [False], rows)


def _behaviour(found: Condensed) -> Shown:
    rows = [
        [row["setting"], row["quantity"].replace("_", " "), row["unit"], _number(row["before"], ".3g"),
         _number(row["after"], ".3g"), str(row["prompts"]), str(row["runs"])]
        for _, row in found.behaviour.iterrows()
    ]  # fmt: skip
    columns = ("setting", "quantity", "unit", "before", "after", "n", "runs")
    return Shown(columns, [False] * 3 + [True] * 4, rows)


def _correlations(found: Condensed) -> Shown:
    rows = [
        [row["model"], row["data"], row["role"], row["expected"],
         _estimate(row["correlation"], row["low"], row["high"]), str(row["n"]), str(row["runs"])]
        for _, row in found.correlations.iterrows()
    ]  # fmt: skip
    columns = ("model", "data", "pathway", "expected from", "correlation (1) [95 %]", "n", "runs")
    return Shown(columns, [False] * 4 + [True] * 3, rows)


def _comparisons(table: "pd.DataFrame") -> Shown:
    """Medians over places, by setting, pathway, dose, control and effect."""
    keys = ["setting", "role", "treatment", "dose", "against", "quantity", "unit"]
    rows = []
    for key, part in table.groupby(keys, sort=False):
        beats = int((part["p_value"] <= 0.05).sum())
        rows.append([
            *key[:5], key[5].replace("_", " "), key[6], _number(part["effect"].median(), ".2g"),
            _number(part["controls"].median(), ".2g"), f"{beats} of {len(part)}",
            _range(part["n"]),
        ])  # fmt: skip
    columns = ("setting", "pathway", "edit", "dose", "against", "effect", "unit", "median", "controls' median",
               "p ≤ 0.05", "controls")  # fmt: skip
    return Shown(columns, [False] * 7 + [True] * 4, rows)


def _variants(found: Condensed) -> Mapping[str, str]:
    """What a setting's name leaves out of its variant."""
    pairs = found.rows[["setting", "variant"]].drop_duplicates().itertuples(index=False)
    return {setting: variant for setting, variant in pairs if variant and variant not in setting}


def _most_seeds(found: Condensed) -> int:
    trained = found.rows[found.rows["trajectory"] == "training"]
    return int(trained.groupby("setting")["replicate"].nunique().max()) if len(trained) else 0


def _estimate(value: float, low: Any, high: Any) -> str:
    import pandas as pd  # noqa: PLC0415 (slow)

    return _number(value) if pd.isna(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: Any, form: str = ".2f") -> str:
    import pandas as pd  # noqa: PLC0415 (slow)

    return "-" if pd.isna(value) else f"{value:{form}}"


def _null(row: "pd.Series") -> str:
    return f"{row['null_mean']:.2f} ± {2 * row['null_sd']:.2f}"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _samples(row: "pd.Series") -> str:
    if row["interval_over"] == "layers":
        return f"{row['layers']} layers of 1 run"
    return f"{row['runs']} seeds" if row["interval_over"] else "1 run, 1 layer"


def _range(values: "pd.Series") -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"
