"""The claim of arXiv:2511.08567 that reinforcement learning preserves the spectrum of a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from weightgeom.analysis.referee import BEYOND_THE_NULL, CONTRAST, Finding, Update


@dataclass(frozen=True)
class PreservedSpectrum:
    """The normalised shift of the singular values is smaller than by its null."""

    paper: ClassVar[str] = "arXiv:2511.08567"
    statement: ClassVar[str] = "Reinforcement learning preserves the singular values of a matrix."
    published: ClassVar[str] = ""
    about: ClassVar[str] = CONTRAST
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rotation": ("spectral_shift", "null_spectral_shift_mean", "null_spectral_shift_sd")
    }
    rule: ClassVar[str] = BEYOND_THE_NULL.format(side="below")

    def judged(self, update: Update) -> Finding:
        """Against updates of equal spectrum with random singular vectors."""
        return update.beyond("rotation", "spectral_shift", "below")
