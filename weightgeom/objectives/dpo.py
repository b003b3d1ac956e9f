"""Direct preference optimization and its relatives, by TRL's `DPOTrainer`."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from math import log as ln
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import Role
from weightgeom.interfaces import Scored
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.trainers import check_pairs, own_loss, preference_trainer, with_sharpness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}  # TRL's other losses ignore label_smoothing
LOSS_TYPES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down"
    " discopop sft sigmoid_norm"
).split()


@dataclass(frozen=True)
class DPO:
    """-log sigmoid(beta (log-ratio of chosen - of rejected)), ratios against the policy at the start.

    With `precompute_reference`, the base's log-probabilities of all pairs are computed before the training,
    which then holds no second network. `loss_type` is any of TRL's, or a list of them with `loss_weights`;
    `options` are further arguments of its `DPOConfig`, such as `f_divergence_type`.
    Source: arXiv:2305.18290, eq. 7.
    """

    beta: float = Field(default=0.1, gt=0)
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    precompute_reference: bool = False
    options: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse settings that TRL would refuse only after loading the model."""
        types = self.loss_types
        if unknown := [name for name in types if name not in LOSS_TYPES]:
            raise ValueError(f"unknown loss_type {unknown[0]!r}; choose from {', '.join(LOSS_TYPES)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(types):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} entries for {len(types)} loss types;"
                " give one for each"
            )
        if self.label_smoothing and not SMOOTHED & set(types):
            raise ValueError(
                f"loss_type {self.loss_type} ignores label_smoothing: choose from"
                f" {', '.join(sorted(SMOOTHED))}, or objective=graded_contrastive with tau above 0"
            )
        if self.precompute_reference and self.options.get("sync_ref_model"):
            raise ValueError(
                "options.sync_ref_model moves the reference, which precompute_reference computes once:"
                " set only one"
            )
        if "exo_pair" in types and self.label_smoothing == 0:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0, such as 1e-3")

    @property
    def loss_types(self) -> list[str]:
        """The loss types as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @property
    def role(self) -> Role:
        """Chosen responses against rejected ones."""
        return "contrast"

    def of_text(self, examples: Examples) -> bool:
        """It trains on responses."""
        return False

    @property
    def first_loss(self) -> float | None:
        """ln 2 (nats) for the plain sigmoid loss: policy and reference are still the same."""
        return (
            ln(2) if self.loss_types == ["sigmoid"] and not self.loss_weights and not self.options else None
        )

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data have no pairs, or an option is not TRL's."""
        check_pairs("dpo", examples)
        if self.options:
            from trl import DPOConfig

            known = {field.name for field in fields(DPOConfig)}
            own = {
                "beta",
                "loss_type",
                "loss_weights",
                "label_smoothing",
                *Training().arguments(Path(), 0, "cpu"),
            }
            for name in self.options:
                if name in own:
                    raise ValueError(
                        f"objective.options cannot set {name!r}, a key of objective or training: set it there"
                    )
                if name not in known:
                    near = ", ".join(get_close_matches(name, known - own)) or ", ".join(sorted(known - own))
                    raise ValueError(f"TRL's DPOConfig has no option {name!r}; the nearest are {near}")

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """A `DPOTrainer` whose reference is `network` as it is now; logs truncation."""
        from trl import DPOTrainer

        own = {
            "beta": self.beta,
            "loss_type": self.loss_types,
            "loss_weights": self.loss_weights,
            "label_smoothing": self.label_smoothing,
            **({"precompute_ref_log_probs": True} if self.precompute_reference else {}),
        }
        trainer = preference_trainer(
            DPOTrainer, network, tokenizer, examples, {**arguments, **own, **self.options}
        )
        return with_sharpness(trainer, self.scored, contrasted=1.0)

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """The tokens of the responses; a pair is one term, with its chosen response in the first half."""
        pairs = len(inputs["completion_mask"]) // 2
        return Scored(inputs["completion_mask"].bool(), [*range(pairs), *range(pairs)], [1] * pairs)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """The loss summed over the pairs of a batch, in nats."""
        return own_loss(trainer, inputs) * (len(inputs["completion_mask"]) // 2)
