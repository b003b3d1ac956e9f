"""The one page of a report, and the files next to it."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.disk import write_atomically
from runners.report.figures import Illustration, illustrations
from runners.report.tables import shown_tables
from runners.report.uncertainty import Companion, companion
from weightgeom.analysis.claims import verdicts
from weightgeom.analysis.over_seeds import Condensed, condense
from weightgeom.analysis.referee import REFEREE, RULES, VERDICTS, measured
from weightgeom.analysis.rules import CLAIMS, CONTRADICTED, DECISION, INCONCLUSIVE, SUPPORTED, UNTESTED
from weightgeom.declarations import SPECTRA

if TYPE_CHECKING:
    import pandas as pd

    from runners.report.read import Study

TEMPLATE = Path(__file__).with_name("report.html")
# The headings of sections that no run measured, and the command that measures each.
MISSING = {
    "asymmetry": ("The read and write ratios", "weightgeom run objective=dpo"),
    "trajectory": ("The trajectory", "weightgeom run experiment=trajectory"),
    "behaviour": ("What the trainings achieved", "weightgeom run objective=dpo 'probe=[rsf,behaviour]'"),
    "graded": ("The graded control", "weightgeom run experiment=graded_control -m"),
    "mechanism": ("The mechanism", "weightgeom run 'probe=[rsf,behaviour,moments]'"),
    "rank1": ("The rank-1 edits", "weightgeom run experiment=causal"),
    "surgery": ("The surgery on the update", "weightgeom run experiment=causal"),
    "uncertainty": ("Uncertainty, the companion paper", "weightgeom run experiment=uncertainty"),
}


def write(study: "Study", directory: Path) -> Path:
    """Write tables, figures and the page in place of earlier ones in `directory`; returns the page."""
    condensed = condense(study.rows, study.runs, study.declarations)
    judged = verdicts(condensed, study.runs)
    uncertainty = companion(study.rows, study.declarations)
    for part in ("tables", "figures"):
        shutil.rmtree(directory / part, ignore_errors=True)
    tables = {"rows": study.rows, "runs": study.runs, "claims": judged, **condensed.tables}
    if uncertainty is not None:
        tables |= {"claims_uncertainty": uncertainty.claims, "bridge": uncertainty.bridge}
    if study.refereed is not None:
        tables[REFEREE] = study.refereed
    (directory / "tables").mkdir(parents=True)
    kept = {name: table for name, table in tables.items() if len(table)}
    for name, table in kept.items():
        table.to_parquet(directory / "tables" / f"{name}.parquet")
        table.to_csv(directory / "tables" / csv(name), index=False)
    drawn = illustrations(condensed, uncertainty, directory / "figures")
    page = directory / "index.html"
    write_atomically(page, rendered(study, condensed, judged, uncertainty, drawn, list(kept)))
    return page


def csv(name: str) -> str:
    """The file name of a table as CSV; every number of a study, with its names, is large."""
    return f"{name}.csv.gz" if name == "rows" else f"{name}.csv"


def rendered(
    study: "Study",
    condensed: Condensed,
    judged: "pd.DataFrame",
    uncertainty: Companion | None,
    drawn: Sequence[Illustration],
    tables: Sequence[str],
) -> str:
    """The page as HTML; everything that comes from outside is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = shown_tables(study, condensed, uncertainty)
    there = {figure.section for figure in drawn} | shown.keys()
    missing = {name: heading for name, heading in MISSING.items() if name not in there}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        names=study.names,
        tracking_uri=study.tracking_uri,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=len(study.runs),
        rows=len(study.rows),
        unfinished=study.unfinished,
        left_out=len(study.runs) - condensed.rows["run_id"].nunique(),
        seeds=_most_seeds(condensed),
        claims=[_claim(claim, judged) for claim in CLAIMS],
        companion=[] if uncertainty is None else _grouped(uncertainty.claims),
        refereed=[] if study.refereed is None else _refereed(study.refereed),
        refereed_rules=RULES,
        tables=shown,
        variants=_variants(condensed),
        choices=_choices(study.runs),
        figures={section: [figure for figure in drawn if figure.section == section] for section in there},
        missing=missing,
        files={name: csv(name) for name in tables},
        overall=_overall(judged),
        decision=DECISION,
        others=({SPECTRA: []} if SPECTRA in there else {}) | _others(condensed),
    )


def _others(condensed: Condensed) -> dict[str, list[str]]:
    """The tables of every further section by its heading."""
    sections: dict[str, list[str]] = {}
    for other in condensed.others:
        sections.setdefault(other.section, []).append(other.table)
    return sections


def _overall(judged: "pd.DataFrame") -> str:
    """The numbers of claims by verdict, in a sentence."""
    by_claim = judged.groupby("claim")["verdict"].agg(lambda lines: frozenset(lines) - {UNTESTED})
    mixed = by_claim.map(lambda verdicts: len(verdicts) > 1)
    counts = {
        "supports {} wherever it tests {}": by_claim == {SUPPORTED},
        "contradicts {} wherever it tests {}": by_claim == {CONTRADICTED},
        "is inconclusive about {}": by_claim == {INCONCLUSIVE},
        "has different verdicts on {} in different settings": mixed,
        "does not test {}": by_claim == frozenset(),
    }
    parts = [
        text.format(int(which.sum()), "it" if which.sum() == 1 else "them")
        for text, which in counts.items()
        if which.any()
    ]
    return f"Of the paper's {len(CLAIMS)} claims this study {'; it '.join(parts)}."


def _claim(claim: Any, judged: "pd.DataFrame") -> dict[str, Any]:
    lines = judged[judged["claim"] == claim.number]
    counts = {
        verdict: int((lines["verdict"] == verdict).sum())
        for verdict in (SUPPORTED, CONTRADICTED, INCONCLUSIVE, UNTESTED)
    }
    return {
        "number": claim.number,
        "statement": claim.statement,
        "rule": claim.rule,
        "counts": {verdict: count for verdict, count in counts.items() if count},
        "lines": lines.to_dict("records"),
    }


def _grouped(claims: "pd.DataFrame") -> list[dict[str, Any]]:
    """The companion paper's claims, each with its lines."""
    return [
        {"statement": claim[:1].upper() + claim[1:], "counts": dict(part["verdict"].value_counts()),
         "lines": part.to_dict("records")}
        for claim, part in claims.groupby("claim", sort=False)
    ]  # fmt: skip


def _refereed(verdicts: "pd.DataFrame") -> list[dict[str, Any]]:
    """The claims of the referee, each with a line for every update that it judged."""
    several = verdicts["run_id"].nunique() > 1
    claims = []
    for _, part in verdicts.groupby(["paper", "claim"], sort=False):
        first, counts = part.iloc[0], part["verdict"].value_counts()
        lines = [
            {
                "of": f"{row['run_name']}: {row['update']}" if several else row["update"],
                "trained_by": row["trained_by"],
                "ours": measured(row, "ours"),
                "null": measured(row, "null"),
                **{name: row[name] for name in ("verdict", "detail", "n")},
            }
            for _, row in part.iterrows()
        ]
        counted = {verdict: int(counts[verdict]) for verdict in VERDICTS if verdict in counts}
        texts = {name: first[name] for name in ("paper", "statement", "published", "rule")}
        claims.append({**texts, "counts": counted, "lines": lines})
    return claims


def _variants(condensed: Condensed) -> Mapping[str, str]:
    """The part of a setting's variant that its name leaves out."""
    pairs = condensed.rows[["setting", "variant"]].drop_duplicates().itertuples(index=False)
    return {setting: variant for setting, variant in pairs if variant and variant not in setting}


def _choices(runs: "pd.DataFrame") -> dict[str, list[str]]:
    """The values behind every choice of a model, data set or objective, as often as they differ."""
    choices: dict[str, list[str]] = {}
    for group in ("model", "data", "objective", "training"):
        named = runs[group] if group in ("model", "data") else runs["objective"]
        for choice, values in zip(named, runs[f"{group}_is"], strict=True):
            key = "training" if group == "training" else f"{group} {choice}"
            if values and values not in choices.setdefault(key, []):
                choices[key].append(values)
    return {key: values for key, values in choices.items() if values}


def _most_seeds(condensed: Condensed) -> int:
    trained = condensed.rows[condensed.rows["trajectory"] == "training"]
    return int(trained.groupby("setting")["replicate"].nunique().max()) if len(trained) else 0
