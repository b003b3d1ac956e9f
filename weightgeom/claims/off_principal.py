"""The claim of arXiv:2511.08567 that reinforcement learning moves weights off the principal ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_A_SHARE, CONTRAST, Finding, Update


@dataclass(frozen=True)
class OffPrincipal:
    """The overlap of visible entries with principal weights lies below the share of weights in that mask."""

    paper: ClassVar[str] = "arXiv:2511.08567"
    statement: ClassVar[str] = (
        "Reinforcement learning updates weights off the principal ones, the largest of a matrix's low-rank"
        " part."
    )
    published: ClassVar[str] = ""
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "sparsity": ("principal_overlap", "null_principal_overlap_mean", "null_principal_overlap_sd")
    }
    rule: ClassVar[str] = BEYOND_A_SHARE.format(side="below", end=0, level="the share of entries in the mask")

    def judged(self, update: Update) -> Finding:
        """Against iid updates of equal visible density, rounded to the checkpoint's grid."""
        share = update.param("probe.sparsity.alpha", 0.3)
        return update.beyond("sparsity", "principal_overlap", "below", share, end=0.0)
