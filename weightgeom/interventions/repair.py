"""Repair: a state is drawn towards the subspace of the factual ones, against random subspaces."""

from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.uncertainty.state_edits import LayerStates, StateEdit, StateIntervention


@dataclass(frozen=True)
class Repair(StateIntervention):
    """(1 - w) h + w PCA(h), by the factual states' components that hold `explained` of their variance.

    A control projects on a random subspace of the same dimension through the same mean and is scaled to add
    as much. Strengths are w, 0.2 in the source. Quantities: those of `weightgeom.causal.trials.measured`, for
    the effects of `weightgeom.uncertainty.state_edits.StateEditSettings`. Source: arXiv:2603.13911v1; the
    controls are ours.
    """

    kind: ClassVar[str] = "repair"

    strengths: list[float] = Field(default_factory=lambda: [0.2, 0.5, 1.0], min_length=1)
    explained: float = Field(default=0.95, gt=0, lt=1)

    def shift(self, ground: LayerStates, strength: float, generator: torch.Generator | None) -> StateEdit:
        """w (PCA(h) - h) for every prompt, or with a random subspace."""
        mean = ground.factual.mean(0)
        _, values, axes = torch.linalg.svd(ground.factual - mean, full_matrices=False)
        shares = values.square().cumsum(0) / values.square().sum()
        k = int((shares < self.explained).sum()) + 1
        basis = axes[:k].T
        if generator is not None:
            basis = torch.linalg.qr(torch.randn(basis.shape, generator=generator)).Q
        apart = ground.edited - mean
        inside = apart @ basis @ basis.T
        return StateEdit(ground.layer, strength * (inside - apart), torch.zeros(len(apart)))
