"""The contracts between the rooms of the house: what data, objectives and probes promise. Read this first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from weightgeom.model import LanguageModel

Params = Mapping[str, Tensor]
"""Weights, updates, gradients or moments by parameter name, in memory or read lazily from disk."""

Text = str | list[dict[str, str]]
"""Plain text, or a conversation as a list of `{"role": ..., "content": ...}` messages."""

Row = dict[str, Any]
"""One number of a result table; the columns are those of `weightgeom.table`."""


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, one preferred to the other."""

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Examples:
    """What a data set holds, read and checked: documents and preference pairs, each with a held-out part.

    A part that the data set does not have is empty. `digest` is a SHA-256 over all the contents.
    """

    name: str
    text: Sequence[str]
    heldout: Sequence[str]
    pairs: Sequence[Pair]
    heldout_pairs: Sequence[Pair]
    digest: str


@runtime_checkable
class Data(Protocol):
    """A data set that can be read."""

    def examples(self) -> Examples:
        """Read and check everything, deterministically; raises ValueError on bad input."""
        ...
