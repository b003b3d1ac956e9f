"""Steering: h + α b, towards the uncertain group, against random directions of equal length."""

from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.interfaces import Log, Setting
from weightgeom.models.residual import Architecture
from weightgeom.table import Row
from weightgeom.text.examples import Examples
from weightgeom.uncertainty.state_edits import Ground, Prompted, Shift, tried


@dataclass(frozen=True)
class Steer:
    """The state at the last token of a prompt is moved along the boundary direction b.

    Strengths are shares of the root mean square norm of a state. Quantities: those of
    `weightgeom.causal.trials.measured`, for the effects of `weightgeom.uncertainty.state_edits.Prompted`.
    Source: arXiv:2603.13911v1;
    the controls are ours.
    """

    headline: ClassVar[str] = "abstention_change"

    strengths: list[float] = Field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0], min_length=1)
    prompted: Prompted = Field(default_factory=Prompted)

    def check(self, architecture: Architecture) -> None:
        """Refuse what the model does not have, and controls that are too few."""
        self.prompted.check(architecture, self.strengths)

    def check_examples(self, examples: Examples) -> None:
        """Refuse data without the groups."""
        self.prompted.check_examples(examples)

    def arms(self, architecture: Architecture) -> int:
        """Treatments and controls, over layers and strengths."""
        return len(self.prompted.chosen(architecture)) * len(self.strengths) * (1 + self.prompted.random)

    def rows(self, setting: Setting, log: Log) -> list[Row]:
        """What every arm did."""
        return tried(self.prompted, setting, log, "steer", self.strengths, shift)


def shift(ground: Ground, strength: float, generator: torch.Generator | None) -> Shift:
    """α b for every prompt, or along a random direction."""
    direction = ground.boundary
    if generator is not None:
        direction = torch.nn.functional.normalize(torch.randn(direction.shape, generator=generator), dim=0)
    n = len(ground.edited)
    return Shift(ground.layer, strength * ground.norm * direction.expand(n, -1), torch.zeros(n))
