"""Repair: a state is drawn towards the subspace of the factual ones, against random subspaces."""

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
class Repair:
    """(1 - w) h + w PCA(h), by the factual states' components that hold `explained` of their variance.

    A control projects on a random subspace of the same dimension through the same mean and is scaled to add
    as much. Strengths are w, 0.2 in the source. Quantities: those of `weightgeom.causal.trials.measured`, for
    the effects of `weightgeom.uncertainty.state_edits.Prompted`. Source: arXiv:2603.13911v1; the controls
    are ours.
    """

    headline: ClassVar[str] = "abstention_change"

    strengths: list[float] = Field(default_factory=lambda: [0.2, 0.5, 1.0], min_length=1)
    explained: float = Field(default=0.95, gt=0, lt=1)
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
        return tried(self.prompted, setting, log, "repair", self.strengths, self.shift)

    def shift(self, ground: Ground, strength: float, generator: torch.Generator | None) -> Shift:
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
        return Shift(ground.layer, strength * (inside - apart), torch.zeros(len(apart)))
