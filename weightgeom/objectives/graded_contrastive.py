"""A graded family of contrastive losses that contains cross-entropy and DPO."""

from collections.abc import Mapping
from math import inf
from math import log as ln
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import Role
from weightgeom.interfaces import Scored
from weightgeom.text.examples import Examples
from weightgeom.training.graded_loss import TokenContrast
from weightgeom.training.trainers import (
    check_pairs,
    check_part,
    own_loss,
    part,
    preference_trainer,
    supervised_trainer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

# Infinity is stored as text, because JSON (and so the signature of a training) cannot represent it.
Tau = Annotated[float | str, BeforeValidator(lambda tau: "inf" if tau == inf else tau)]
SOURCES = {"token": ("uniform", "unigram", "model"), "sequence": ("rejected", "in_batch")}


@dataclass(frozen=True)
class GradedContrastive:
    """-Σ_i q_i log softmax(s)_i over candidates, q = softmax(g / tau), g = 1 for the target, else 0.

    The candidates are next tokens, with their logits as scores, or whole responses to a prompt, with scores
    beta (log pi - log pi_ref), or log pi without a `reference`. A pair's grades are always 1 and 0, so the
    target distribution is uniform only at tau = inf. `negatives` is the number of candidates other than the
    target: by default the whole vocabulary, or the pair's own rejected response.

    `source` is the source of the tokens if there are fewer: `uniform`, `unigram` (by their frequency in the
    training data, plus one), or `model` (the policy's most likely ones). The first two estimate the loss over
    all tokens, with the bias given in `TokenContrast`, so their number affects only the noise; with `model`,
    the number changes the objective. Among responses, the first negative is the pair's own `rejected` one;
    further ones (`in_batch`) are the responses chosen for other prompts of the batch, scored after this
    prompt. `train_on` applies to tokens, as in `objective=ce`.

    Special cases: token, all negatives, tau = 0 is cross-entropy; sequence, 1 negative, tau = 0, reference is
    DPO, and with tau > 0 it is DPO with labels smoothed by sigmoid(-1 / tau). The family is ours; the grading
    of arXiv:2605.16600 is not public.
    """

    level: Literal["token", "sequence"] = "sequence"
    negatives: int | None = Field(default=None, ge=1)
    tau: Tau = 1.0
    reference: bool | None = None
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    source: Literal["auto", "uniform", "unigram", "model", "rejected", "in_batch"] = "auto"
    train_on: Literal["auto", "text", "chosen"] = "auto"

    def __post_init__(self) -> None:
        """Refuse inconsistent settings."""
        if self.tau != "inf" and not (isinstance(self.tau, float) and self.tau >= 0):
            raise ValueError(f"tau must be a number of at least 0, or inf, got {self.tau}")
        if self.source != "auto" and self.source not in SOURCES[self.level]:
            raise ValueError(
                f"source={self.source} has no meaning at level={self.level}:"
                f" choose from {', '.join(SOURCES[self.level])}"
            )
        if self.level == "token":
            if self.reference:
                raise ValueError(
                    "reference=true has no meaning at level=token, whose scores are the logits: set"
                    " objective.reference=false"
                )
            return
        if self.train_on == "text":
            raise ValueError(
                "train_on=text has no meaning at level=sequence, which contrasts responses: set"
                " objective.train_on=chosen"
            )
        if self.source == "rejected" and self.candidates > 2:
            raise ValueError(
                f"source=rejected gives 1 negative, but negatives={self.negatives}: set source=in_batch"
            )
        if self.source == "in_batch" and self.candidates == 2:
            raise ValueError(
                "source=in_batch needs negatives of at least 2: the first is the pair's own rejected response"
            )

    @property
    def candidates(self) -> int:
        """The number of responses contrasted per prompt."""
        return 1 + (self.negatives or 1)

    @property
    def with_reference(self) -> bool:
        """Whether scores are relative to the initial policy; by default for sequences."""
        return self.level == "sequence" and self.reference is not False

    @property
    def role(self) -> Role:
        """A contrast of responses; of tokens it is cross-entropy at one end, and neither in between."""
        if self.level == "sequence":
            return "contrast"
        return "likelihood" if self.negatives is None and self.tau == 0 else "other"

    def of_text(self, examples: Examples) -> bool:
        """Whether it trains on the documents."""
        return self.level == "token" and part(self.train_on, examples) == "text"

    @property
    def within_batch(self) -> bool:
        """Whether the negatives are responses of other examples of the batch."""
        return self.level == "sequence" and self.candidates > 2

    @property
    def first_loss(self) -> float | None:
        """ln(candidates) for every tau, as all initial scores are 0; None without a reference."""
        return ln(self.candidates) if self.with_reference else None

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data lack such examples, or have fewer candidates."""
        if self.level == "token":
            check_part("graded_contrastive", self.train_on, examples)
            return
        check_pairs("graded_contrastive with level=sequence", examples, ", or level=token")
        empty = sum(not pair.rejected for pair in examples.pairs)
        if empty:
            raise ValueError(
                "objective=graded_contrastive with level=sequence needs a rejected response for every"
                f" prompt, but {empty} of {len(examples.pairs)} in {examples.name} have none"
            )
        if self.candidates - 1 > len(examples.pairs):
            raise ValueError(
                f"negatives must be at most {len(examples.pairs)}, the number of pairs in {examples.name},"
                f" got {self.negatives}"
            )

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """A TRL trainer with this loss; logs packing and truncation."""
        if self.level == "token":
            return self._token_trainer(network, tokenizer, examples, arguments)
        from weightgeom.training.graded_trainers import Candidates, SequenceTrainer

        negatives, size = self.candidates - 1, arguments["per_device_train_batch_size"]
        if negatives > size:
            raise ValueError(
                f"negatives must be at most {size}, the batch size, got {negatives}:"
                " raise training.batch_size"
            )
        trainer = preference_trainer(
            SequenceTrainer, network, tokenizer, examples, {**arguments, "beta": self.beta}
        )
        trainer.tau, trainer.reference = float(self.tau), self.with_reference
        trainer.data_collator = Candidates(trainer.data_collator, negatives)
        trainer.precompute_ref_logps = True  # makes TRL's own pass use the given reference values
        if not self.with_reference:
            trainer.ref_model = None
        return trainer

    def _token_trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        from weightgeom.training.graded_trainers import TokenTrainer

        head = network.get_output_embeddings()
        assert head is not None
        vocabulary = len(head.weight)
        negatives = vocabulary - 1 if self.negatives is None else self.negatives
        if negatives >= vocabulary:
            raise ValueError(
                f"negatives must be at most {vocabulary - 1}, the vocabulary without the target,"
                f" got {negatives}"
            )
        source = self.source if self.source in ("unigram", "model") else "uniform"
        trainer = supervised_trainer(
            TokenTrainer, part(self.train_on, examples), network, tokenizer, examples, arguments
        )
        log_unigram = None
        if source == "unigram":
            assert trainer.train_dataset is not None
            counts = torch.ones(vocabulary)  # plus one, so that every token can be drawn
            for row in trainer.train_dataset["labels"]:
                labels = torch.tensor(row[1:])
                counts += torch.bincount(labels[labels != -100], minlength=vocabulary)
            log_unigram = counts.log()
        trainer.contrast = TokenContrast(float(self.tau), negatives, source, arguments["seed"], log_unigram)
        return trainer

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """At token level the tokens with a label, one term each; else the responses, one term per prompt."""
        if self.level == "token":
            targets = inputs["labels"] != -100
            return Scored(targets, list(range(len(targets))), targets[:, 1:].sum(1).tolist())
        prompts, columns = inputs["grades"].shape
        return Scored(inputs["completion_mask"].bool(), [*range(prompts)] * columns, [1] * prompts)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """The loss summed over the tokens or the prompts of a batch, in nats."""
        if self.level == "token":
            return own_loss(trainer, inputs, num_items_in_batch=torch.tensor(1))
        return own_loss(trainer, inputs) * len(inputs["grades"])
