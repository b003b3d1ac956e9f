"""The claim of arXiv:2410.21228 that adapters of low rank add intruder dimensions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_A_LEVEL, UNTESTABLE, Finding, Update


@dataclass(frozen=True)
class IntrudersOfAdapters:
    """Leading singular vectors of a matrix with an adapter that are near to none before it."""

    paper: ClassVar[str] = "arXiv:2410.21228"
    statement: ClassVar[str] = (
        "Training an adapter of low rank adds intruder dimensions: leading singular vectors that are near to"
        " none of those before."
    )
    published: ClassVar[str] = ""
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rotation": ("intruders", "null_intruders_mean", "null_intruders_sd"),
        "rsf": ("delta_norm",),
    }
    rule: ClassVar[str] = "not testable without an adapter; " + BEYOND_A_LEVEL.format(side="above", level="0")

    def judged(self, update: Update) -> Finding:
        """Against updates of equal spectrum with random singular vectors."""
        finding = update.beyond("rotation", "intruders", "above", 0.0)
        if not len(update.values("rsf", "adapter_rank")):
            return replace(finding, verdict=UNTESTABLE, unit="count", detail="the update is of no adapter")
        return replace(finding, unit="count")
