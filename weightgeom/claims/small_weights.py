"""The claim of arXiv:2606.07082 that trainings move the small weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_A_SHARE, Finding, Update


@dataclass(frozen=True)
class SmallWeights:
    """The overlap of visible entries with the smallest weights exceeds the share of weights in that mask."""

    paper: ClassVar[str] = "arXiv:2606.07082"
    statement: ClassVar[str] = (
        "Trainings avoid large weights, reinforcement learning most: the visible changes overlap with the"
        " smallest weights more than the share of weights in that mask."
    )
    published: ClassVar[str] = (
        "overlap with the 30 % smallest weights 31.9 % (SFT), 53.6 % (on-policy distillation) and 73.5 %"
        " (RLVR), where 92.7, 46.3 and 27.8 % of the entries are visible"
    )
    about: ClassVar[str] = ""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "sparsity": ("low_overlap", "null_low_overlap_mean", "null_low_overlap_sd")
    }
    rule: ClassVar[str] = BEYOND_A_SHARE.format(side="above", end=1, level="the share of entries in the mask")

    def judged(self, update: Update) -> Finding:
        """Against iid updates of equal visible density, rounded to the checkpoint's grid."""
        share = update.param("probe.sparsity.alpha", 0.3)
        finding = update.beyond("sparsity", "low_overlap", "above", share, end=1.0)
        visible = 1 - update.values("sparsity", "invisible_share").mean()
        return replace(finding, detail=f"{finding.detail}; {visible:.1%} of the entries are visible")
