"""The claim of arXiv:2505.11711 that reinforcement learning updates few entries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_A_SHARE, CONTRAST, Finding, Update


@dataclass(frozen=True)
class SparseUpdates:
    """More than a half of the entries change by at most 1e-5."""

    paper: ClassVar[str] = "arXiv:2505.11711"
    statement: ClassVar[str] = (
        "Reinforcement learning updates a small part of the entries: most change by at most 1e-5."
    )
    published: ClassVar[str] = ""
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "sparsity": (
            "absolute_unmoved_share",
            "null_absolute_unmoved_share_mean",
            "null_absolute_unmoved_share_sd",
        )
    }
    rule: ClassVar[str] = BEYOND_A_SHARE.format(side="above", end=1, level="a half")

    def judged(self, update: Update) -> Finding:
        """Against iid updates of equal norm."""
        return update.beyond("sparsity", "absolute_unmoved_share", "above", 0.5, end=1.0)
