"""The claim of arXiv:2606.07082 that reinforcement learning leaves most entries equal in bf16."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_A_SHARE, CONTRAST, Finding, Update


@dataclass(frozen=True)
class SparseInBf16:
    """More than a half of the entries are equal before and after, once both are rounded to bf16."""

    paper: ClassVar[str] = "arXiv:2606.07082"
    statement: ClassVar[str] = "After reinforcement learning most entries are equal in bf16."
    published: ClassVar[str] = (
        "27.8 % of the entries visible after RLVR, 46.3 % after on-policy distillation, 92.7 % after SFT"
    )
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "sparsity": ("invisible_share", "null_invisible_share_mean", "null_invisible_share_sd")
    }
    rule: ClassVar[str] = BEYOND_A_SHARE.format(side="above", end=1, level="a half")

    def judged(self, update: Update) -> Finding:
        """Against iid updates of equal norm."""
        return update.beyond("sparsity", "invisible_share", "above", 0.5, end=1.0)
