"""Outlines of model choices, known before any weights are fetched or trained: the input of a plan."""

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
    """The training of a base model from random weights."""

    objective: Objective
    training: Training
    text: Examples


@dataclass(frozen=True, eq=False)
class Outline:
    """A base model by its config: the source of its weights, and its earlier checkpoints.

    `locations` are the checkpoints to fetch, by step: directories, hub names with `@revision` or URLs; empty
    if the weights are trained here, by `pretraining`.
    """

    config: "PreTrainedConfig"
    locations: Mapping[int, str] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None  # None if it is not on this disk yet
    allow_bin: bool = False
    trust_remote_code: bool = False
    cache: bool = False  # remote checkpoints are downloaded whole
    pairs: int = 0  # pairs of checkpoints to be compared

    @property
    def steps(self) -> list[int]:
        """Steps of the base's own checkpoints, which probes measure; empty for a single checkpoint."""
        if self.pretraining is not None:
            return self.pretraining.training.save_steps()
        return sorted(self.locations) if len(self.locations) > 1 else []


@dataclass(frozen=True)
class Shape:
    """The sizes of a network that determine a stage's memory; all bytes are for fp32."""

    d_model: int
    layers: int
    vocabulary: int
    parallel: bool  # o and down of a layer share their upstream gradient
    parameters: int
    saved: float  # bytes per token that a forward pass keeps for the backward pass
    reference: bool  # the objective keeps a copy of the weights as its reference
    longest: int  # approximate tokens of the longest held-out sequence
    mixture: bool = False  # layers have experts
    adapted: bool = False  # LoRA adapters are trained
    compared: int = 1  # checkpoints that a stage compares with the start

    @property
    def weights(self) -> float:
        """Bytes of the weights."""
        return 4.0 * self.parameters

    @property
    def square(self) -> float:
        """Bytes of a d x d matrix."""
        return 4.0 * self.d_model**2

    def logits(self, tokens: int | float) -> float:
        """Bytes of the logits of `tokens` tokens."""
        return 4.0 * tokens * self.vocabulary

    def passing(self, tokens: int | float) -> float:
        """Bytes of a forward and a backward pass with frozen weights, with the unembedding in slices."""
        return tokens * self.saved + 6 * min(self.logits(tokens), 2.0**25)


@runtime_checkable
class EstimatesMemory(Protocol):
    """A probe or an intervention that estimates its own memory."""

    def held(self, shape: Shape, objective: bool) -> float:
        """Peak memory in bytes; `objective` tells whether the trajectory's objective is known."""
        ...


def peak_memory(thing: object, shape: Shape, objective: bool) -> float:
    """Peak memory of a probe or an intervention in bytes; by default two models and a batch's logits."""
    if isinstance(thing, EstimatesMemory):
        return thing.held(shape, objective)
    return 2 * shape.weights + shape.logits(4 * 16 * 96)


@runtime_checkable
class HasOutline(Protocol):
    """A model choice that gives an outline before it fetches or trains weights."""

    def outline(self, examples: Examples, data: Data) -> Outline:
        """The config, and the checkpoints to fetch or the training to run; fetches only configs."""
        ...
