"""The claim of arXiv:2410.21228 that full fine-tuning adds no intruder dimensions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from weightgeom.analysis.referee import EXPLAINED, UNTESTABLE, Finding, Update
from weightgeom.analysis.rules import CONTRADICTED, SUPPORTED


@dataclass(frozen=True)
class NoIntruders:
    """Leading singular vectors of a trained matrix that are near to none before: fewer than one a matrix."""

    paper: ClassVar[str] = "arXiv:2410.21228"
    statement: ClassVar[str] = "Training all weights adds no intruder dimensions."
    published: ClassVar[str] = ""
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rotation": ("intruders", "null_intruders_mean", "null_intruders_sd"),
        "rsf": ("delta_norm",),
    }
    rule: ClassVar[str] = (
        "not testable with an adapter; contradicted if the mean over matrices is one or more; explained by"
        " its null if the null's mean is below one as well; supported otherwise"
    )

    def judged(self, update: Update) -> Finding:
        """Against updates of equal spectrum with random singular vectors."""
        finding = update.beyond("rotation", "intruders", "below")
        if finding.ours is None or finding.null is None:
            return finding
        if len(update.values("rsf", "adapter_rank")):
            return replace(finding, verdict=UNTESTABLE, unit="count", detail="the update is of an adapter")
        verdict = CONTRADICTED if finding.ours >= 1 else EXPLAINED if finding.null < 1 else SUPPORTED
        return replace(finding, verdict=verdict, unit="count")
