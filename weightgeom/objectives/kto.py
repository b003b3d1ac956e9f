"""Kahneman-Tversky optimization on single desirable or undesirable responses, by TRL's `KTOTrainer`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import Role
from weightgeom.interfaces import Scored
from weightgeom.text.examples import Examples
from weightgeom.training.trainers import check_pairs, own_loss, unpaired_trainer, with_sharpness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class KTO:
    """A response's weight times 1 - sigmoid(±beta (its log-ratio - z)), + if it is desirable, - if not.

    The chosen response of a pair is desirable and the rejected one undesirable; the two are otherwise
    unrelated. Ratios are relative to the initial policy; z ≥ 0 estimates the KL divergence from that policy,
    without a gradient, on the batch's responses paired with other prompts. The loss is dimensionless.
    Source: arXiv:2402.01306, eq. 7 and 8.
    """

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    desirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    undesirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def role(self) -> Role:
        """Desirable responses against undesirable ones."""
        return "contrast"

    def of_text(self, examples: Examples) -> bool:
        """It trains on responses."""
        return False

    @property
    def within_batch(self) -> bool:
        """z is estimated from the other responses of the batch."""
        return True

    @property
    def first_loss(self) -> float | None:
        """Half the weight if both kinds have the same weight, as all ratios and z are 0; else None."""
        return self.desirable_weight / 2 if self.desirable_weight == self.undesirable_weight else None

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data have no pairs."""
        check_pairs("kto", examples)

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """A `KTOTrainer` whose reference is a copy of `network`; logs truncation."""
        from trl import KTOTrainer

        own = {
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        trainer = unpaired_trainer(KTOTrainer, network, tokenizer, examples, {**arguments, **own})
        return with_sharpness(trainer, self.scored, contrasted=float("nan"))

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """The tokens of the responses; each response is one term and counts as its own prompt."""
        responses = len(inputs["label"])
        return Scored(inputs["completion_mask"].bool(), list(range(responses)), [1] * responses)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """The loss summed over the responses of a batch; it also depends on the batch's z.

        Additive over batches only if z is 0, as at the start.
        """
        return own_loss(trainer, inputs) * len(inputs["label"])
