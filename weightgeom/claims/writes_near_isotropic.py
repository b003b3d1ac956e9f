"""The claim of arXiv:2605.16600v1 that alignment's updates hardly write."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from weightgeom.analysis.referee import CONTRAST, EXPLAINED, SDS, Finding, Update
from weightgeom.analysis.rules import CONTRADICTED, MARGIN, SUPPORTED


@dataclass(frozen=True)
class WritesNearIsotropic:
    """The relative subspace fraction of o and down in the prediction subspace is near 1."""

    paper: ClassVar[str] = "arXiv:2605.16600v1"
    statement: ClassVar[str] = (
        "In the write pathway (o, down) alignment's updates are near-isotropic against the prediction"
        " subspace."
    )
    published: ClassVar[str] = ""
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"rsf": ("ratio", "null_ratio_mean", "null_ratio_sd")}
    rule: ClassVar[str] = (
        f"supported if the mean over o and down is within a factor of {MARGIN} of 1; outside of it, explained"
        f" by its null within {SDS} standard deviations of the null's mean, and contradicted beyond"
    )

    def judged(self, update: Update) -> Finding:
        """Against rotations of the update, singular values kept."""
        finding = update.beyond("rsf", "ratio", "above", of=("o", "down"))
        if finding.ours is None or finding.null is None or finding.null_sd is None:
            return finding
        near = 1 / MARGIN <= finding.ours <= MARGIN
        wide = abs(finding.ours - finding.null) <= SDS * finding.null_sd
        return replace(finding, verdict=SUPPORTED if near else EXPLAINED if wide else CONTRADICTED)
