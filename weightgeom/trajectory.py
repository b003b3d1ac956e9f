"""The checkpoints of one training in order, and the base model that a training starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints of one training by optimizer step, in order: updates count from the first on.

    `from_random` marks the first one as a random initialisation, whose subspaces carry no information. For a
    chain of trainings, the steps number its stages and `stages` lists the stages' names in order.
    """

    name: str
    steps: Mapping[int, Path]
    from_random: bool = False
    stages: tuple[str, ...] = ()

    @property
    def first(self) -> int:
        """The first step: 0, unless the checkpoint from before the training was not kept."""
        return min(self.steps)

    @property
    def last(self) -> int:
        """The last step."""
        return max(self.steps)


@dataclass(frozen=True)
class Base:
    """The checkpoint that a run starts from, with its earlier checkpoints where they are known.

    For a chain, `pairs` compares every stage after the first with the stage before it, in order.
    """

    directory: Path
    identity: str  # equal for equal weights; part of the signature of every result computed from them
    trajectory: Trajectory | None = None
    pairs: tuple["Base", ...] = ()
