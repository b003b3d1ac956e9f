"""Cross-entropy: next-token prediction on documents, or on the chosen responses of preference pairs."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.interfaces import Examples, Scored
from weightgeom.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

log = logging.getLogger(__name__)


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
        if not (examples.pairs if self.examples(examples) == "chosen" else examples.text):
            needed = "preference pairs" if self.on == "chosen" else "text"
            raise ValueError(f"objective=ce on {self.on} needs {needed}, and {examples.name} has none")

    def examples(self, examples: Examples) -> Literal["text", "chosen"]:
        """Which part of the data it is trained on."""
        if self.on != "auto":
            return self.on
        return "chosen" if examples.pairs and not examples.text else "text"

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """An `SFTTrainer` on the examples; says in the log what was packed or cut."""
        import datasets  # noqa: PLC0415 (heavy)
        from trl import SFTConfig, SFTTrainer  # noqa: PLC0415 (heavy)

        datasets.disable_progress_bars()
        length = arguments["max_length"]
        on_text = self.examples(examples) == "text"
        if on_text:
            dataset = datasets.Dataset.from_dict({"text": list(examples.text)})
            packing: dict[str, Any] = {"packing": True, "packing_strategy": "wrapped"}
        else:
            tokens = [tokenize(pair, tokenizer)[:2] for pair in examples.pairs]
            kept = [pair for pair in tokens if len(pair[0]) < length]
            if not kept:
                raise ValueError(f"every prompt is {length} tokens or longer: raise training.max_length")
            cut = sum(len(prompt) + len(response) > length for prompt, response in kept)
            log.info(
                "%d chosen responses: %d dropped (prompt of %d tokens or more), %d cut at %d tokens",
                *(len(tokens), len(tokens) - len(kept), length, cut, length),
            )
            dataset = datasets.Dataset.from_dict(
                {
                    "input_ids": [prompt + response for prompt, response in kept],
                    "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in kept],
                }
            )
            packing = {"completion_only_loss": True}
        trainer = SFTTrainer(
            model=network,
            args=SFTConfig(**arguments, **packing),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        if on_text:
            log.info(
                "%d documents packed end to end into %d sequences of %d tokens, none cut",
                *(len(examples.text), len(trainer.train_dataset), length),  # pyright: ignore[reportArgumentType]
            )
        return trainer

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """The tokens with a label, each a term; every sequence is a prompt of its own."""
        targets = inputs["labels"] != -100
        terms = targets[:, 1:].sum(1).tolist()
        return Scored(targets, list(range(len(targets))), terms)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """-log p summed over the tokens of a batch, in nats."""
        assert trainer.model is not None
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(1))
        assert isinstance(loss, Tensor)
        return loss
