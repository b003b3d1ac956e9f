"""The claim of arXiv:2511.08567 that reinforcement learning moves weights of low magnitude."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_A_SHARE, CONTRAST, Finding, Update


@dataclass(frozen=True)
class LowMagnitude:
    """The overlap of visible entries with the smallest weights exceeds the share of weights in that mask."""

    paper: ClassVar[str] = "arXiv:2511.08567"
    statement: ClassVar[str] = "Reinforcement learning updates weights of low magnitude."
    published: ClassVar[str] = ""
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "sparsity": ("low_overlap", "null_low_overlap_mean", "null_low_overlap_sd")
    }
    rule: ClassVar[str] = BEYOND_A_SHARE.format(side="above", end=1, level="the share of entries in the mask")

    def judged(self, update: Update) -> Finding:
        """Against iid updates of equal visible density, rounded to the checkpoint's grid."""
        share = update.param("probe.sparsity.alpha", 0.3)
        return update.beyond("sparsity", "low_overlap", "above", share, end=1.0)
