"""The claim of arXiv:2511.08567 that reinforcement learning hardly rotates principal subspaces."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_THE_NULL, CONTRAST, Finding, Update


@dataclass(frozen=True)
class LittleRotation:
    """The mean principal angle between leading left singular vectors is smaller than that of its null."""

    paper: ClassVar[str] = "arXiv:2511.08567"
    statement: ClassVar[str] = "Reinforcement learning hardly rotates the principal subspaces of a matrix."
    published: ClassVar[str] = ""
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rotation": ("left_angle", "null_left_angle_mean", "null_left_angle_sd")
    }
    rule: ClassVar[str] = BEYOND_THE_NULL.format(side="below")

    def judged(self, update: Update) -> Finding:
        """Against updates of equal spectrum with random singular vectors."""
        finding = update.beyond("rotation", "left_angle", "below")
        right, noise = (
            update.values("rotation", name).mean() for name in ("right_angle", "noise_left_angle_mean")
        )
        detail = (
            f"{finding.detail}; the right angle is {right:.3g}°,"
            f" and noise of equal norm turns by {noise:.3g}°"
        )
        return replace(finding, unit="degree", detail=detail)
