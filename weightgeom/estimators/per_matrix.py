"""The probe that a function of two matrices stands for: its rows for every residual matrix."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite

import torch

from weightgeom.declarations import ProbeDeclaration
from weightgeom.estimators.pairs import MatrixPair, Visit, alone, each_pair
from weightgeom.interfaces import MatrixFunction, Probe, Setting
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.table import Row, row


@dataclass(frozen=True)
class PerMatrix:
    """Every quantity of `function.of_matrix(before, after)`, in fp32 with a row for each output.

    `before` is the matrix at the trajectory's start, `after` at the measured step. A matrix that has not
    moved has no row of a quantity that is not finite there, such as a share of its change.
    """

    function: MatrixFunction

    def __post_init__(self) -> None:
        """Refuse a headline that is no name."""
        headline = self.function.headline
        if not isinstance(headline, str) or not headline:
            raise ValueError(
                f"{type(self.function).__name__}.headline must be the name of a quantity of of_matrix, got"
                f" {headline!r}"
            )

    @property
    def declaration(self) -> ProbeDeclaration:
        """All that is generic."""
        return ProbeDeclaration(self.function.headline, divisible=True)

    def check(self, architecture: Architecture) -> None:
        """Every model will do."""

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint."""
        return alone(self, setting)

    def visits(self, setting: Setting) -> Callable[[Params], Visit]:
        """The same, for a walk with others."""
        return lambda params: each_pair(self._rows)

    def _rows(self, pair: MatrixPair) -> Iterator[Row]:
        before, after = pair.stored_before.float(), pair.stored_after.float()
        unmoved = torch.equal(before, after)
        for quantity, value in self.function.of_matrix(before, after).items():
            if isfinite(value) or not unmoved:
                yield row(quantity, float(value), n=after.numel(), **pair.matrix.table_columns)


def as_probe(thing: object) -> object:
    """A function of two matrices as the probe that it stands for; anything else as it is."""
    if isinstance(thing, MatrixFunction) and not isinstance(thing, Probe):
        return PerMatrix(thing)
    return thing
