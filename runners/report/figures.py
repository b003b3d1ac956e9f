"""The figures of a report, each with a caption that says how to read it."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from runners.report.uncertainty import Companion, illustrated
from weightgeom.analysis.comparisons import principal
from weightgeom.analysis.evidence import rank_correlation
from weightgeom.analysis.over_seeds import Condensed, Other
from weightgeom.declarations import ASYMMETRY, EDITS, MECHANISM, SPECTRA, SURGERY, InterventionDeclaration
from weightgeom.table import by_given_subspace

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MARGIN = "preference_margin_change"
SCALE = 0.72  # of a page's pixels to those of an image at 200 dpi: two columns fill the page


@dataclass(frozen=True)
class Illustration:
    """A figure that was saved as `path`, a PNG with a PDF next to it, and its place on the page."""

    section: str
    caption: str
    path: Path
    folded: bool = False  # shown on demand

    @property
    def source(self) -> str:
        """The image itself, for the page to hold."""
        return "data:image/png;base64," + b64encode(self.path.read_bytes()).decode()

    @property
    def width(self) -> int:
        """The width on the page, in its pixels, so that text has one size in all figures."""
        return round(int.from_bytes(self.path.read_bytes()[16:20], "big") * SCALE)  # of a PNG's header


def illustrations(condensed: Condensed, uncertainty: Companion | None, directory: Path) -> list[Illustration]:
    """Draw and save all figures that the tables allow, in the order of the page."""
    from weightgeom.figures.base import save

    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for section, name, figure, caption, folded in chain(
        _figures(condensed), () if uncertainty is None else illustrated(uncertainty)
    ):
        paths = [directory / f"{name}.{ending}" for ending in ("png", "pdf")]
        save(figure, *paths)
        drawn.append(Illustration(section, caption, paths[0], folded))
    return drawn


def _figures(condensed: Condensed) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    """Section, file name, figure, caption, and whether it is folded away."""
    yield from _asymmetry(condensed)
    yield from _graded(condensed)
    if len(condensed.mechanism):
        from weightgeom.figures import base as figures

        rows = condensed.rows[condensed.rows["table"] == condensed.names[MECHANISM]].assign(
            run=lambda rows: rows["run_id"]
        )
        yield (
            "mechanism",
            "mechanism",
            figures.expected_and_measured(rows),
            "Ratio expected from the base alone against the ratio measured after training. Left: from second"
            " moments, as if inputs and gradients of outputs were independent. Right: from the mean"
            " gradient, as each training's optimizer would use it in its first step, and no training. A point"
            " is a matrix of a layer of a run (circles read, squares write); bars are the bootstrap's"
            " standard error over prompts. On the dashed line the expectation is exact.",
            False,
        )
    yield from _interventions(condensed)
    yield from _spectra(condensed.rows)
    for other in condensed.others:
        yield from _other(other)


def _asymmetry(condensed: Condensed) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    if not len(condensed.asymmetry):
        return
    from weightgeom.figures import base as figures
    from weightgeom.figures import study as figures_report

    means, runs = (table[table["matrix"] == ""] for table in (condensed.asymmetry, condensed.ended))
    yield (
        "asymmetry",
        "asymmetry",
        figures_report.ratios_by_setting(means, runs),
        "The share of each update inside the read subspace (left) and the write subspace (right), sorted by"
        " the write side. Grey points are single runs, the mean over layers and matrices; the coloured point"
        " is the mean over runs with its 95 % interval over seeds, where there are several (an interval may"
        " reach beyond the axis). The grey band is where random directions with the update's"
        " own singular values would lie; the dashed line is the isotropic level, 1.",
        False,
    )
    table = condensed.trajectory[condensed.trajectory["matrix"] != ""]
    table = table[table.groupby("setting")["step"].transform("nunique") > 1]  # two checkpoints are no line
    first = table["trajectory"] == "pretraining"
    if len(table):
        yield (
            "trajectory",
            "trajectory",
            figures_report.ratio_along_training(_concatenated([table[first], table[~first]])),
            "The same ratio along each training, matrix by matrix: the mean over layers and runs; bars are"
            " one standard error over seeds, where there are several. Solid lines read,"
            " dashed lines write; the grey line is the isotropic level.",
            False,
        )
    ratios = condensed.rows[condensed.rows["table"] == condensed.names[ASYMMETRY]]
    for number, (setting, part) in enumerate(ratios.groupby("setting", sort=False)):
        end = part[part["step"] == part.groupby("run_id")["step"].transform("max")].copy()
        end["k"] = end["k"].astype("float")  # a missing one is no group
        keys = ["layer", "matrix", "head", "expert", "role", "subspace", "k", "quantity"]
        grouped = end[end["k"].notna()].groupby(keys, sort=False, dropna=False)
        mean = grouped["value"].mean().reset_index().assign(step=0)
        if (mean["quantity"] == "ratio").any():
            yield (
                "asymmetry",
                f"layers_{number}",
                figures.ratio_by_layer(mean, 0),
                f"{setting}, layer by layer, at the last step; the mean over"
                f" {_many(end['run_id'].nunique(), 'run')}. The grey band is the widest null of a panel's"
                " matrices, its mean ± 2 standard deviations.",
                True,
            )


def _graded(condensed: Condensed) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    places = list(condensed.graded.groupby(["model", "data", "preference"], sort=False))
    for number, ((model, data, preference), part) in enumerate(places):
        if part["run"].nunique() < 3 or not part["objective"].str.startswith("graded").any():
            continue
        from weightgeom.figures import base as figures

        correlations = {role: rank_correlation(part[part["role"] == role]) for role in ("read", "write")}
        where = " · ".join(name for name in (model, data, preference) if name)
        yield (
            "graded",
            f"graded_control_{number}",
            figures.ratio_by_sharpness(part, correlations, part["measure"].iloc[0].removeprefix("the ")),
            f"{where}: ratio against {part['measure'].iloc[0]}, as measured along each training. A pair has"
            " one alternative that carries gradient, the next token up to all of the vocabulary. A point is"
            " an objective, with ± 2 standard errors over its seeds; grey points are single runs, squares the"
            " exact ends of the family. Below: Spearman's rank correlation over objectives, and its p-value"
            " by permuting them.",
            False,
        )


def _interventions(condensed: Condensed) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    for section, draw in ((EDITS, _rank1), (SURGERY, _surgery)):
        rows = condensed.rows[condensed.rows["table"] == condensed.names[section]]
        for number, (setting, part) in enumerate(rows.groupby("setting", sort=False)):
            run = part["replicate"].min()
            of_run = part[part["replicate"] == run]
            more = part["run_id"].nunique() - 1
            whose = f"{setting}, seed {run.partition('/')[0]}"
            whose += f" ({_many(more, 'more run')} in the tables)" if more else ""
            yield from draw(of_run, whose, number)


def _rank1(rows: "pd.DataFrame", whose: str, number: int) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    from weightgeom.figures import causal as figures_causal

    yield (
        "rank1",
        f"rank1_by_layer_{number}",
        figures_causal.treatment_by_layer(rows),
        f"{whose}: one rank-1 edit's effect, by layer, at the largest strength. In colour the edit along the"
        " concentrated direction, with one standard error over prompts; in grey edits of equal size along"
        " control directions. Filled: p ≤ 0.05 by rank among the random ones.",
        False,
    )
    has_margin = (rows["quantity"] == MARGIN).any()
    for effect in ("heldout_ce_change", *([MARGIN] if has_margin else [])):
        yield (
            "rank1",
            f"rank1_{effect}_{number}",
            figures_causal.dose_response(rows, effect),
            f"{whose}: absolute effect by strength, the mean over layers. Dashed: the first-order prediction"
            " α uᵀGv, no edit made. Grey: the median of the random controls and their central 90 %.",
            effect == MARGIN,
        )


def _surgery(rows: "pd.DataFrame", whose: str, number: int) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    if not (rows["quantity"] == MARGIN).any():  # data without pairs: the tables have the divergence
        return
    from weightgeom.figures import causal as figures_causal

    given = by_given_subspace(rows)
    yield (
        "surgery",
        f"surgery_{number}",
        figures_causal.surgery_curve(given.pop("")),
        f"{whose}: what becomes of the trained preference margin when the update's part in the top k"
        " directions is taken out, or alone left in. In grey, random subspaces of the same dimension and of"
        " the same removed energy (bars: the range of the draws). The dashed line is the trained model.",
        False,
    )
    for frame, part in given.items():
        yield (
            "surgery",
            f"surgery_{frame}_{number}",
            figures_causal.surgery_curve(part),
            f"{whose}: the same for the update's part inside the given subspace {frame}.",
            False,
        )
    if (rows["dose"] == "transplant").any():
        yield (
            "surgery",
            f"transplants_{number}",
            figures_causal.transplants(rows),
            f"{whose}: the margin that each part of the update brings to the base when it alone is added."
            " Grey: the same part, its directions rotated at random. Diamond: the interaction, the margin of"
            " all weights less those of the pathways and of the rest.",
            False,
        )


def _spectra(rows: "pd.DataFrame") -> "Iterator[tuple[str, str, Figure, str, bool]]":
    """The stable ranks of every setting's updates and weights, the mean over its runs."""
    from weightgeom.figures.spectrum import stable_ranks, things

    rows = rows.loc[(rows["trajectory"] == "training") & rows["quantity"].str.contains("stable_rank")]
    for number, (setting, part) in enumerate(rows.groupby("setting", sort=False)):
        last = part[part["step"] == part.groupby("run_id")["step"].transform("max")].assign(step=0)
        if things(last):
            yield (
                SPECTRA,
                f"spectra_{number}",
                stable_ranks(last),
                f"{setting}: the stable rank ‖W‖²_F / ‖W‖²_2 of the update and of the weights by layer,"
                f" over that of iid Gaussian entries; the mean over {_many(last['run_id'].nunique(), 'run')}."
                " Below the dashed line few directions hold more than noise would give them.",
                number > 0,
            )


def _other(other: Other) -> "Iterator[tuple[str, str, Figure, str, bool]]":
    """A table that brings no section of its own: its headline by setting, or its effects."""
    from weightgeom.figures import generic

    declaration, plain = other.declaration, re.sub(r"\W", "_", other.table)
    if isinstance(declaration, InterventionDeclaration):
        effect = next((name for name in declaration.effects if (other.runs["quantity"] == name).any()), None)
        rows = other.runs[other.runs["quantity"] == effect]
        for number, (setting, part) in enumerate(rows.groupby("setting", sort=False)):
            part = part[part["run_id"] == part["run_id"].iloc[-1]]
            part = principal(part, declaration.controls)
            yield (
                other.section,
                f"{plain}_{number}",
                generic.effects(part, f"{str(effect).replace('_', ' ')} ({part['unit'].iloc[0]})"),
                f"{setting}: the effect of the treatment, with the median of its matched controls in grey."
                " Filled: p ≤ 0.05 by rank among them.",
                number > 0,
            )
        return
    for number, (quantity, means) in enumerate(other.means.groupby("quantity", sort=False)):
        name = declaration.label if quantity == declaration.headline else ""
        label = f"{name or str(quantity).replace('_', ' ')} ({means['unit'].iloc[0]})"
        runs = other.runs[other.runs["quantity"] == quantity]
        yield (
            other.section,
            f"{plain}_{number}",
            generic.by_setting(means, runs, label),
            f"{str(quantity).replace('_', ' ')} of the table {other.table} at the last step. A coloured point"
            " is the mean over layers and runs, with its 95 % interval over seeds where there are several;"
            " those in grey are runs.",
            number > 0,
        )


def _concatenated(tables: "list[pd.DataFrame]") -> "pd.DataFrame":
    import pandas as pd

    return pd.concat(tables)


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
