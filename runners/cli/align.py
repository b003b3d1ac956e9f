"""Several trainings of one base, aligned pair by pair."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from weightgeom.table import of_the_model

if TYPE_CHECKING:
    import pandas as pd


def aligned(before: str, named: Sequence[str], out: Path) -> None:
    """Write the table and the heat maps of trainings `NAME=AFTER` into `out`; the same name is another seed.

    Raises:
        ValueError: if one of them has no name, besides those of `weightgeom.bases.trainings.alignments`.
    """
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
    shown = whole[~whole["quantity"].str.startswith("null_")]
    wide = shown.pivot(index=["treatment", "against"], columns="quantity", values="value")
    print(wide.to_string(float_format="{:.3g}".format, na_rep=""))
    findings = _refereed(table)
    findings.to_csv(out / "referee.csv", index=False)
    for _, line in findings.iterrows():
        print(f"\n{line['paper']}: {line['statement']}\n  {line['verdict']}: {line['detail']}")
    print(f"\ntables and heat maps: {out}")


def _refereed(table: "pd.DataFrame") -> "pd.DataFrame":
    """The verdicts on the published claims about several trainings of one base."""
    from weightgeom.analysis.referee import Update, verdicts
    from weightgeom.analysis.trainings import ALIGNMENT
    from weightgeom.claims import published

    claims = [resolve_name(path)() for path in published()]
    of_trainings = [claim for claim in claims if set(claim.needs) == {ALIGNMENT}]
    return verdicts(of_trainings, [Update("all trainings", {ALIGNMENT: table}, 1)])
