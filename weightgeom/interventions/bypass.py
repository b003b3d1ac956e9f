"""Bypass: the uncertainty read from a state is added to the logits of abstaining, past the output layer."""

from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.uncertainty.state_edits import LayerStates, StateEdit, StateIntervention


@dataclass(frozen=True)
class Bypass(StateIntervention):
    """logit[abstain] += γ σ(2 z), z the standardised projection of a state on the boundary direction.

    Mean and standard deviation are those of both groups' training halves together. A control projects on
    a random direction instead and adds as much, root mean square over prompts. Strengths γ are in nats.
    Quantities: those of `weightgeom.causal.trials.measured`, for the effects of
    `weightgeom.uncertainty.state_edits.StateEditSettings`.
    Source: arXiv:2603.13911v1; the probe's scale and the controls are ours.
    """

    kind: ClassVar[str] = "bypass"

    strengths: list[float] = Field(default_factory=lambda: [2.0, 4.0, 8.0, 16.0], min_length=1)

    def shift(self, ground: LayerStates, strength: float, generator: torch.Generator | None) -> StateEdit:
        """γ σ(2 z) for every prompt, z along b or along a random direction."""
        direction = ground.boundary
        if generator is not None:
            direction = torch.randn(direction.shape, generator=generator)
        seen = torch.cat([ground.factual, ground.uncertain]) @ direction
        z = (ground.edited @ direction - seen.mean()) / seen.std()
        return StateEdit(ground.layer, torch.zeros_like(ground.edited), strength * torch.sigmoid(2 * z))
