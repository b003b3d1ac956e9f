"""Cross-entropy: next-token prediction on documents, or on the chosen responses of preference pairs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.interfaces import Scored
from weightgeom.text.examples import Examples
from weightgeom.training.trainers import Part, check_part, own_loss, part, supervised, with_sharpness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class CE:
    """-log p(token | before), the mean over tokens, in nats; trained by TRL's `SFTTrainer`.

    `on` is what it is trained on: `text` (documents, packed end to end), `chosen` (the responses to
    the prompts of the pairs, whose own tokens are not scored), or `auto`: text, where the data has any.
    """

    on: Literal["auto", "text", "chosen"] = "auto"

    @property
    def first_loss(self) -> None:
        """Not known beforehand."""
        return None

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data have no such examples."""
        check_part("ce", self.on, examples)

    def examples(self, examples: Examples) -> Part:
        """Which part of the data it is trained on."""
        return part(self.on, examples)

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """An `SFTTrainer` on the examples; says in the log what was packed or cut."""
        from trl import SFTTrainer

        trainer = supervised(SFTTrainer, self.examples(examples), network, tokenizer, examples, arguments)
        return with_sharpness(trainer, self.scored)

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """The tokens with a label, each a term; every sequence is a prompt of its own."""
        targets = inputs["labels"] != -100
        terms = targets[:, 1:].sum(1).tolist()
        return Scored(targets, list(range(len(targets))), terms)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """-log p summed over the tokens of a batch, in nats."""
        return own_loss(trainer, inputs, num_items_in_batch=torch.tensor(1))
