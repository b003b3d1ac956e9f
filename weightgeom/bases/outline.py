"""What a choice of model comes to, told before anything is fetched or made: what a plan starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from weightgeom.interfaces import Data, Objective
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pretraining:
    """A training that makes the base, from random weights."""

    objective: Objective
    training: Training
    text: Examples


@dataclass(frozen=True, eq=False)
class Outline:
    """A base by its config: where its weights come from, and the checkpoints that lie behind it.

    `locations` are what is fetched, by step, directories or hub names with `@revision`; empty where the
    weights are made here. A plan of several stages has a `Pretraining` for each that is trained here.
    """

    config: "PreTrainedConfig"
    locations: Mapping[int, str] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None  # where it is here already
    allow_bin: bool = False
    trust_remote_code: bool = False
    pairs: int = 0  # of checkpoints, each a comparison of its own

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that probes measure before any objective; empty for a single one."""
        if self.pretraining is not None:
            return self.pretraining.training.save_steps()
        return sorted(self.locations) if len(self.locations) > 1 else []


@dataclass(frozen=True)
class Shape:
    """A network's sizes, without its weights: what the memory of a stage follows from. Bytes are of fp32."""

    d_model: int
    layers: int
    vocabulary: int
    parallel: bool  # o and down of a layer share their upstream gradient
    parameters: int
    saved: float  # bytes that a forward pass leaves for the backward one, for each token
    reference: bool  # the objective compares with a copy of the weights
    longest: int  # tokens of a held-out pair's longer side, about

    @property
    def weights(self) -> float:
        """Bytes of the weights."""
        return 4.0 * self.parameters

    @property
    def square(self) -> float:
        """Bytes of a d x d matrix."""
        return 4.0 * self.d_model**2

    def logits(self, tokens: int | float) -> float:
        """Bytes of the logits of so many tokens."""
        return 4.0 * tokens * self.vocabulary

    def passing(self, tokens: int | float) -> float:
        """Bytes of a forward and a backward pass of frozen weights, of which the head works in slices."""
        return tokens * self.saved + 6 * min(self.logits(tokens), 2.0**25)


@runtime_checkable
class Weighed(Protocol):
    """A probe or an intervention that knows what it holds."""

    def held(self, shape: Shape, objective: bool) -> float:
        """Bytes in memory at its highest; `objective` says that the trajectory's is known."""
        ...


def weight_of(thing: object, shape: Shape, objective: bool) -> float:
    """What a probe or an intervention holds, in bytes: if it cannot tell, two models and a batch's logits."""
    if isinstance(thing, Weighed):
        return thing.held(shape, objective)
    return 2 * shape.weights + shape.logits(4 * 16 * 96)


@runtime_checkable
class Outlined(Protocol):
    """A model choice that can tell what it comes to."""

    def outline(self, examples: Examples, data: Data) -> Outline:
        """Its config, and what is fetched or trained; fetches configs alone."""
        ...
