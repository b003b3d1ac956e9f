"""Steering: h + α b, towards the uncertain group, against random directions of equal length."""

from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.uncertainty.state_edits import LayerStates, StateEdit, StateIntervention


@dataclass(frozen=True)
class Steer(StateIntervention):
    """The state at the last token of a prompt is moved along the boundary direction b.

    Strengths are shares of the root mean square norm of a state. Quantities: those of
    `weightgeom.causal.trials.measured`, for the effects of
    `weightgeom.uncertainty.state_edits.StateEditSettings`. Source: arXiv:2603.13911v1; the controls are ours.
    """

    kind: ClassVar[str] = "steer"

    strengths: list[float] = Field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0], min_length=1)

    def shift(self, ground: LayerStates, strength: float, generator: torch.Generator | None) -> StateEdit:
        """α b for every prompt, or along a random direction."""
        direction = ground.boundary
        if generator is not None:
            direction = torch.nn.functional.normalize(
                torch.randn(direction.shape, generator=generator), dim=0
            )
        n = len(ground.edited)
        return StateEdit(ground.layer, strength * ground.norm * direction.expand(n, -1), torch.zeros(n))
