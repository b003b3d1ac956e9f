"""The claim of arXiv:2605.16600v1 that alignment's updates concentrate where q and k read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_A_LEVEL, CONTRAST, UNTESTABLE, Finding, Update
from weightgeom.analysis.rules import MARGIN


@dataclass(frozen=True)
class ReadsConcentrate:
    """The relative subspace fraction of q and k in the principal directions of their inputs exceeds 1."""

    paper: ClassVar[str] = "arXiv:2605.16600v1"
    statement: ClassVar[str] = (
        "Alignment's updates concentrate in the read pathway, along the principal directions of the inputs of"
        " q and k."
    )
    published: ClassVar[str] = ""
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"rsf": ("ratio", "null_ratio_mean", "null_ratio_sd")}
    rule: ClassVar[str] = BEYOND_A_LEVEL.format(side="above", level=MARGIN) + (
        "; of q and k, and not testable with an adapter"
    )

    def judged(self, update: Update) -> Finding:
        """Against rotations of the update, singular values kept."""
        finding = update.beyond("rsf", "ratio", "above", MARGIN, of=("q", "k"))
        if len(update.values("rsf", "adapter_rank")):
            random = "an adapter's reads lie in the row space of A, which is random at first"
            return replace(finding, verdict=UNTESTABLE, detail=f"{random}; {finding.detail}")
        matched = update.values("rsf", "matched_ratio", of=("q", "k"))
        if not len(matched):
            return finding
        detail = (
            f"{finding.detail}; the matched level, of any objective with these inputs,"
            f" is {matched.mean():.3g}"
        )
        return replace(finding, detail=detail)
