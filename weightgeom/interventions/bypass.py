"""Bypass: what the state says of uncertainty is added to the logits of abstaining, past the output layer."""

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
class Bypass:
    """logit[abstain] += γ σ(2 z), z the standardised projection of a state on the boundary direction.

    Mean and standard deviation are those of both groups' training halves together. A control projects on
    a random direction instead and adds as much, root mean square over prompts. Strengths γ are in nats.
    Quantities: those of `weightgeom.causal.trials.measured`, for the effects of
    `weightgeom.uncertainty.state_edits.Prompted`.
    Source: arXiv:2603.13911v1; the probe's scale and the controls are ours.
    """

    headline: ClassVar[str] = "abstention_change"

    strengths: list[float] = Field(default_factory=lambda: [2.0, 4.0, 8.0, 16.0], min_length=1)
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
        return tried(self.prompted, setting, log, "bypass", self.strengths, shift)


def shift(ground: Ground, strength: float, generator: torch.Generator | None) -> Shift:
    """γ σ(2 z) for every prompt, z along b or along a random direction."""
    direction = ground.boundary
    if generator is not None:
        direction = torch.randn(direction.shape, generator=generator)
    seen = torch.cat([ground.factual, ground.uncertain]) @ direction
    z = (ground.edited @ direction - seen.mean()) / seen.std()
    return Shift(ground.layer, torch.zeros_like(ground.edited), strength * torch.sigmoid(2 * z))
