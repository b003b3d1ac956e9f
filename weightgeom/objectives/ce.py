"""Cross-entropy: next-token prediction on documents, or on the chosen responses of preference pairs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import Role
from weightgeom.interfaces import Scored
from weightgeom.text.examples import Examples
from weightgeom.training.trainers import Part, check_part, own_loss, part, supervised_trainer, with_sharpness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class CE:
    """-log p(token | before), the mean over tokens, in nats; trained by TRL's `SFTTrainer`.

    `train_on` is the training part of the data: `text` (documents, packed end to end), `chosen` (the chosen
    responses of the pairs; the prompts' tokens are not scored), or `auto`: text if the data have any.
    """

    train_on: Literal["auto", "text", "chosen"] = "auto"

    @property
    def role(self) -> Role:
        """The likelihood of tokens alone."""
        return "likelihood"

    def of_text(self, examples: Examples) -> bool:
        """Whether it trains on the documents."""
        return self.examples(examples) == "text"

    @property
    def first_loss(self) -> None:
        """None: the loss of an untrained batch is not known in advance."""
        return None

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data lack the training part."""
        check_part("ce", self.train_on, examples)

    def examples(self, examples: Examples) -> Part:
        """The training part of the data."""
        return part(self.train_on, examples)

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """An `SFTTrainer` on the training part; logs packing and truncation."""
        from trl import SFTTrainer

        trainer = supervised_trainer(
            SFTTrainer, self.examples(examples), network, tokenizer, examples, arguments
        )
        return with_sharpness(trainer, self.scored)

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """The tokens with a label, one term each; every sequence counts as a prompt."""
        targets = inputs["labels"] != -100
        terms = targets[:, 1:].sum(1).tolist()
        return Scored(targets, list(range(len(targets))), terms)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """-log p summed over the tokens of a batch, in nats."""
        return own_loss(trainer, inputs, num_items_in_batch=torch.tensor(1))
