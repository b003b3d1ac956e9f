"""The contracts between the rooms of the house: what data, objectives and probes promise. Read this first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from weightgeom.interruption import Request, no_request
from weightgeom.params import Params
from weightgeom.table import Row
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from weightgeom.models.language_model import LanguageModel
    from weightgeom.models.residual import Architecture
    from weightgeom.training.config import Training


@dataclass(frozen=True)
class Setting:
    """What a probe is given once per trajectory: where it starts and ends, the examples, and the objective.

    `objective` is that of the trajectory, None where it is not known, and `training` how it trains; `last`
    is the step of its end.
    """

    model: "LanguageModel"
    start: Params
    end: Params
    from_random: bool
    examples: Examples
    seed: int
    objective: "Objective | None" = None
    training: "Training | None" = None
    last: int = 0


@dataclass(frozen=True)
class Scored:
    """What the loss of one batch of an objective's trainer is about.

    `targets` marks the tokens whose prediction it scores; `prompt` says which of the batch's prompts
    each sequence belongs to; `terms` counts, for each prompt, the terms that the loss is a mean of.
    """

    targets: Bool[Tensor, "sequence position"]
    prompt: list[int]
    terms: list[int]


Log = Callable[[Mapping[str, float], int], None]
"""Receives metrics by name and the optimizer step that they belong to."""


@runtime_checkable
class Stage(Protocol):
    """Makes a directory by `work(directory, log)`, unless an equal specification was made before."""

    def __call__(
        self, name: str, specification: Mapping[str, object], work: Callable[[Path, Log], None], steps: int
    ) -> Path:
        """The finished directory; `work` takes `steps` steps."""
        ...


@runtime_checkable
class Data(Protocol):
    """A data set that can be read."""

    def examples(self) -> Examples:
        """Read and check everything, deterministically; raises ValueError on bad input."""
        ...


@runtime_checkable
class Model(Protocol):
    """Where the weights come from."""

    def check(self, longest: int | None) -> "Architecture":
        """Refuse what cannot work before anything expensive starts.

        `longest` is the length, in tokens, of what an objective will train on; None if none follows.
        """
        ...

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, request: Request = no_request
    ) -> Base:
        """Fetch or make the base; what is made is made inside a stage, so that it is made once.

        A training polls `request` after every step.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    """A loss to train on, by a trainer of TRL."""

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data lack what the objective needs."""
        ...

    @property
    def first_loss(self) -> float | None:
        """What the loss of the first batch must be, where that is known."""
        ...

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """A trainer for `network`, which its `train` mutates; `arguments` are those of TrainingArguments.

        With a `peft_config` among them an adapter is trained, whose layers `network` then has.
        """
        ...

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """What the loss of a batch of the trainer is about."""
        ...

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """The trainer's own loss of a batch, as a sum over its terms instead of their mean, in nats."""
        ...


@runtime_checkable
class Probe(Protocol):
    """A measurement of one model, made at every checkpoint of a trajectory."""

    headline: ClassVar[str]
    """The quantity that stands for a matrix in curves and summaries."""

    def check(self, architecture: "Architecture") -> None:
        """Raise ValueError if the model does not allow what is asked for."""
        ...

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement, with all that is common to the checkpoints of a trajectory done once."""
        ...


@runtime_checkable
class NeedsExamples(Protocol):
    """A probe or an intervention that not every data set will do for."""

    def check_examples(self, examples: Examples) -> None:
        """Raise ValueError if the data lack what is measured on."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """Edits of one model's weights, each tried against its matched controls."""

    headline: ClassVar[str]
    """The effect that stands for a matrix in curves and summaries."""

    def check(self, architecture: "Architecture") -> None:
        """Raise ValueError if the model does not allow what is asked for, or the controls are too few."""
        ...

    def arms(self, architecture: "Architecture") -> int:
        """How many edited models are measured."""
        ...

    def rows(self, setting: Setting, log: Log) -> list[Row]:
        """What every arm did; `log` is told how many are done."""
        ...
