"""The contracts of data, bases, objectives, probes and interventions. Read this first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightgeom.declarations import InterventionDeclaration, ProbeDeclaration, Role
from weightgeom.interruption import Request, no_request
from weightgeom.params import Params
from weightgeom.table import Row
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from weightgeom.models.language_model import LanguageModel
    from weightgeom.models.residual import Architecture
    from weightgeom.training.config import Training


Keep = Callable[[Callable[[], list[Row]]], list[Row]]
"""Returns the rows of a function: where an interrupted attempt has kept those of the same call, without it.

The n-th call of one attempt is the n-th of every other one.
"""


Shared = Callable[[Callable[[Path], None]], Path]
"""Returns the directory that a function has filled, once for all processes that measure a trajectory."""


def unkept(rows: Callable[[], list[Row]]) -> list[Row]:
    """The rows of the function, of which nothing is kept."""
    return rows()


@dataclass(frozen=True)
class Setting:
    """The inputs of a probe, once per trajectory: its start and end, the examples, and the objective.

    `objective` is that of the trajectory, None where it is not known, and `training` how it trains; `last`
    is the step of its end. `checkpoints` are all of its weights by step, in order, each opened when it is
    asked for; empty where there is no trajectory. `keep` keeps the rows of an intervention's finished trials.
    Where a trajectory is measured in pieces, `before` are the weights of the checkpoint before the first one
    measured, and `shared` keeps what all pieces need.
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
    checkpoints: Mapping[int, Params] = field(default_factory=dict)
    keep: Keep = unkept
    before: Params | None = None
    shared: Shared | None = None


@dataclass(frozen=True)
class Scored:
    """The terms of the loss of one batch, and the tokens and prompts that they score.

    `targets` marks the tokens whose prediction it scores; `prompt` says which of the batch's prompts
    each sequence belongs to; `terms` counts, for each prompt, the terms that the loss is a mean of.
    `input_ids` and `attention_mask` are the sequences as the network reads them, for a batch that does not
    hold them under these names, such as TRL's `chosen_input_ids` and `rejected_input_ids`.
    """

    targets: Bool[Tensor, "sequence position"]
    prompt: list[int]
    terms: list[int]
    input_ids: Int[Tensor, "sequence position"] | None = None
    attention_mask: Int[Tensor, "sequence position"] | None = None

    def read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask as the network reads them: the batch's own, where none are given."""
        ids, mask = self.input_ids, self.attention_mask
        return inputs["input_ids"] if ids is None else ids, inputs["attention_mask"] if mask is None else mask


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
        """Refuse impossible settings before anything expensive starts.

        `longest` is the length, in tokens, of an objective's longest sequence; None if none follows.
        """
        ...

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, request: Request = no_request
    ) -> Base:
        """Fetch the base, or make it inside a stage, so that it is made once.

        A training polls `request` after every step.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    """A loss to train on, by a trainer of TRL."""

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data lack fields that the objective needs."""
        ...

    @property
    def first_loss(self) -> float | None:
        """The loss of the first batch, where theory gives it."""
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
        """The terms of the loss of a trainer's batch."""
        ...

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """The trainer's own loss of a batch, as a sum over its terms instead of their mean, in nats."""
        ...


@runtime_checkable
class KnownRole(Protocol):
    """An objective with a role (contrast, likelihood, other), which is recorded and which the claims read."""

    @property
    def role(self) -> Role:
        """`contrast` of responses, `likelihood` of tokens, or `other`."""
        ...

    def of_text(self, examples: Examples) -> bool:
        """Whether it trains on the corpus, and not on responses."""
        ...


@runtime_checkable
class WithinBatch(Protocol):
    """An objective that may not be trained on several processes, each of which has a part of every batch."""

    @property
    def within_batch(self) -> bool:
        """Whether the loss relates the examples of a batch to each other."""
        ...


@runtime_checkable
class OnPolicy(Protocol):
    """An objective on completions that the policy samples, so that no fixed batch has its loss."""

    @property
    def on_policy(self) -> bool:
        """Whether the policy samples its own training data."""
        ...


@runtime_checkable
class Probe(Protocol):
    """A measurement of one model, made at every checkpoint of a trajectory."""

    @property
    def declaration(self) -> ProbeDeclaration:
        """Headline, curves and report section; usually a constant of the class."""
        ...

    def check(self, architecture: "Architecture") -> None:
        """Raise ValueError if the settings do not fit the model."""
        ...

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement, with all that is common to the checkpoints of a trajectory done once."""
        ...


@runtime_checkable
class MatrixFunction(Protocol):
    """A function of two matrices, which is enough of a probe: the runner makes its rows.

    `weightgeom.estimators.per_matrix.PerMatrix` is the probe that it stands for.
    """

    headline: str

    def of_matrix(
        self, before: Float[Tensor, "d_out d_in"], after: Float[Tensor, "d_out d_in"]
    ) -> Mapping[str, float]:
        """Quantities by name, the headline among them."""
        ...


@runtime_checkable
class Summarised(Protocol):
    """A probe with a terminal table of its own."""

    def summary(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """Text in short: the levels of its index and its columns become columns; empty shows nothing."""
        ...


@runtime_checkable
class Drawn(Protocol):
    """A probe or an intervention with figures of its own."""

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """Figures by file name, of its tables of one run.

        `tables` has its table `training`; `pretraining`, of the base's past; of a chain `between`, every
        stage against the one before it, and `stages`, its rows of the comparison of all stages.
        """
        ...


@runtime_checkable
class NeedsExamples(Protocol):
    """A probe or an intervention that not every data set will do for."""

    def check_examples(self, examples: Examples) -> None:
        """Raise ValueError if the data lack the texts or pairs that the measurement needs."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """Edits of one model's weights, each tried against its matched controls."""

    @property
    def declaration(self) -> InterventionDeclaration:
        """Headline effect, kinds of control and report section."""
        ...

    def check(self, architecture: "Architecture") -> None:
        """Raise ValueError if the settings do not fit the model, or the controls are too few."""
        ...

    def arms(self, architecture: "Architecture") -> int:
        """The number of edited models that are measured."""
        ...

    def rows(self, setting: Setting, log: Log) -> list[Row]:
        """The effects of every arm; `log` receives the number of finished arms."""
        ...
