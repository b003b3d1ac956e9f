"""Several trainings of one base, aligned pair by pair."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from weightgeom.analysis.trainings import between, pairs
from weightgeom.table import of_the_model

if TYPE_CHECKING:
    import pandas as pd


def aligned(before: str, named: Sequence[str], out: Path) -> None:
    """Write the table and the heat maps of trainings `NAME=AFTER` into `out`; the same name is another seed.

    Raises:
        ValueError: if one of them has no name, besides those of `weightgeom.bases.trainings.alignments`.
    """
    from rich import get_console

    from runners.summary.terminal import fitting, judged_shown
    from weightgeom.analysis.referee import counted
    from weightgeom.bases.trainings import alignments, name_of
    from weightgeom.figures.alignment import heat_maps
    from weightgeom.figures.base import save

    trainings: dict[str, list[str]] = {}
    for part in named:
        name, equals, after = part.partition("=")
        if not (name and equals and after):
            raise ValueError(
                f"{part} has no name: write NAME={part}, the same NAME for seeds of one training"
            )
        trainings.setdefault(name, []).append(after)
    table = alignments(before, trainings)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "alignment.csv", index=False)
    table.to_parquet(out / "alignment.parquet")
    names = {
        label: label
        for name, ends in trainings.items()
        for label in (name_of(name, seed, len(ends)) for seed in range(len(ends)))
    }
    whole = of_the_model(table)
    pairs = whole[whole["treatment"].isin(names)].assign(step=whole["treatment"])
    save(heat_maps(pairs, names), out / "alignment.png", out / "alignment.pdf")
    findings = _refereed(table)
    findings.to_csv(out / "referee.csv", index=False)
    console = get_console()
    shown = {
        "Updates, two by two": _pairs(table),
        "Two trainings, and seeds of one": _trainings(whole),
        f"Published claims: {counted(findings)}": judged_shown(findings),
    }
    for title, short in shown.items():
        for part in fitting(short, title, console) if len(short) else ():
            console.print(part)
    print(f"tables and heat maps: {out}")


def _pairs(table: "pd.DataFrame") -> "pd.DataFrame":
    """Every two updates A and B: their cosine, and how much of each lies in the other's leading ones."""
    import pandas as pd

    by_pair = pairs(table, 1)
    rows = [
        {
            "A": first,
            "B": second,
            "cosine": f"{pair['cosine']:.3f}",
            "mode overlap": f"{pair['mode_overlap']:.3f}",
            "A in B": f"{pair['alignment_ratio']:.3f}",
            "B in A": f"{by_pair.loc[(second, first), 'alignment_ratio']:.3f}",
            "null": f"{pair['null_alignment_ratio_mean']:.3f}",
        }
        for (first, second), pair in by_pair.dropna(subset="cosine").iterrows()
    ]
    return pd.DataFrame(rows)


def _trainings(whole: "pd.DataFrame") -> "pd.DataFrame":
    """Every two trainings with several seeds: means between them and, ± one sd, within each."""
    import pandas as pd

    p_values = whole.set_index(["treatment", "against", "quantity"])["value"]
    rows = [
        {
            "training": first,
            "against": second,
            "quantity": quantity.replace("_", " "),
            "between": f"{pair['between']:.3f}",
            "within": f"{pair['within']:.3f} ± {pair['sd']:.2g}",
            "p": f"{p_values[first, second, f'within_{quantity}_p_value']:.2g}",
        }
        for quantity in ("cosine", "mode_overlap", "alignment_ratio")
        for (first, second), pair in between(whole, quantity).iterrows()
    ]
    return pd.DataFrame(rows)


def _refereed(table: "pd.DataFrame") -> "pd.DataFrame":
    """The verdicts on the published claims about several trainings of one base."""
    from weightgeom.analysis.referee import Update, verdicts
    from weightgeom.analysis.trainings import ALIGNMENT
    from weightgeom.claims import published

    claims = [resolve_name(path)() for path in published()]
    of_trainings = [claim for claim in claims if set(claim.needs) == {ALIGNMENT}]
    return verdicts(of_trainings, [Update("all trainings", {ALIGNMENT: table}, 1)])
