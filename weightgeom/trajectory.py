"""Checkpoints of one training in order, and the base that a training starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints of one training by optimizer step; 0 is before training, the highest the end.

    `from_random` says that step 0 is a random initialisation, whose subspaces mean nothing. Of a chain of
    trainings the steps number its stages, and `stages` has their names in order.
    """

    name: str
    steps: Mapping[int, Path]
    from_random: bool = False
    stages: tuple[str, ...] = ()

    @property
    def last(self) -> int:
        """The step of the end."""
        return max(self.steps)


@dataclass(frozen=True)
class Base:
    """What a model choice provides: the checkpoint to start from, and its past where that is known.

    Of a chain, `pairs` has every stage but the first, in order, as what comes of the one before it.
    """

    directory: Path
    identity: str  # equal for equal weights: part of the signature of all that is made from them
    trajectory: Trajectory | None = None
    pairs: tuple["Base", ...] = ()
