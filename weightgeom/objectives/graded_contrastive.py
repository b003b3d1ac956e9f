"""A graded family of contrastive losses that contains cross-entropy and DPO."""

from collections.abc import Mapping
from math import inf
from math import log as ln
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.interfaces import Scored
from weightgeom.text.examples import Examples
from weightgeom.training.graded_loss import TokenContrast
from weightgeom.training.trainers import check_pairs, check_part, own_loss, part, preference, supervised

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

# JSON, and with it the signature of a training, cannot hold infinity: it is kept as text.
Tau = Annotated[float | str, BeforeValidator(lambda tau: "inf" if tau == inf else tau)]
SOURCES = {"token": ("uniform", "unigram", "model"), "sequence": ("rejected", "in_batch")}


@dataclass(frozen=True)
class GradedContrastive:
    """-Σ_i q_i log softmax(s)_i over candidates, q = softmax(g / tau), g = 1 for the target, else 0.

    The candidates are next tokens, with their logits as scores, or whole responses to a prompt, with
    beta (log pi - log pi_ref), or log pi where the `reference` is off. A pair's grades are always 1 and
    0, so that only tau = inf makes them all alike. `negatives` is how many candidates there are besides
    the target: by default all of the vocabulary, or the pair's own rejected response.

    `source` says where fewer tokens come from: `uniform`, `unigram` (as frequent as in what is trained
    on, plus one), or `model`, the policy's own best. The first two estimate the loss over all tokens,
    with a bias that `TokenContrast` states, so that there the number is a matter of noise; with
    `model` it is one of the objective. Of responses, the first is the pair's own `rejected` one, further
    ones (`in_batch`) those chosen for other prompts of the batch, scored behind this prompt.
    `on` is for tokens what it is for `objective=ce`.

    Exactly: token, all negatives, tau = 0 is cross-entropy; sequence, 1 negative, tau = 0, reference is
    DPO, and with tau > 0 it is DPO with labels smoothed by sigmoid(-1 / tau). The family is ours; what
    arXiv:2605.16600 grades is not public.
    """

    level: Literal["token", "sequence"] = "sequence"
    negatives: int | None = Field(default=None, ge=1)
    tau: Tau = 1.0
    reference: bool | None = None
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    source: Literal["auto", "uniform", "unigram", "model", "rejected", "in_batch"] = "auto"
    on: Literal["auto", "text", "chosen"] = "auto"

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.tau != "inf" and not (isinstance(self.tau, float) and self.tau >= 0):
            raise ValueError(f"tau must be a number of at least 0, or inf, got {self.tau}")
        if self.source != "auto" and self.source not in SOURCES[self.level]:
            raise ValueError(
                f"source={self.source} has no meaning at level={self.level}:"
                f" choose {', '.join(SOURCES[self.level])}"
            )
        if self.level == "token":
            if self.reference:
                raise ValueError("reference=true has no meaning at level=token, whose scores are the logits")
            return
        if self.on == "text":
            raise ValueError("on=text has no meaning at level=sequence, which contrasts responses")
        if self.source == "rejected" and self.candidates > 2:
            raise ValueError(
                f"source=rejected has 1 negative, the pair's own, and negatives={self.negatives}:"
                " set source=in_batch"
            )
        if self.source == "in_batch" and self.candidates == 2:
            raise ValueError(
                "source=in_batch needs negatives of 2 or more: the first is the pair's own rejected response"
            )

    @property
    def candidates(self) -> int:
        """How many responses to a prompt are contrasted."""
        return 1 + (self.negatives or 1)

    @property
    def with_reference(self) -> bool:
        """Whether scores are taken against the policy at the start; on where it has a meaning."""
        return self.level == "sequence" and self.reference is not False

    @property
    def first_loss(self) -> float | None:
        """With a reference all scores are 0 at first: the log of the number of candidates, for every tau."""
        return ln(self.candidates) if self.with_reference else None

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data have no such examples, or fewer candidates."""
        if self.level == "token":
            check_part("graded_contrastive", self.on, examples)
            return
        check_pairs("graded_contrastive with level=sequence", examples, ", or level=token")
        empty = sum(not pair.rejected for pair in examples.pairs)
        if empty:
            raise ValueError(
                f"objective=graded_contrastive with level=sequence needs a rejected response for every"
                f" prompt, and {empty} of {len(examples.pairs)} in {examples.name} have none"
            )
        if self.candidates - 1 > len(examples.pairs):
            raise ValueError(
                f"negatives={self.negatives} is more than {examples.name} has:"
                f" {len(examples.pairs)} pairs give at most {len(examples.pairs)}"
            )

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """A trainer of TRL with this loss; says in the log what was packed or cut."""
        if self.level == "token":
            return self._token_trainer(network, tokenizer, examples, arguments)
        from weightgeom.training.graded_trainers import Candidates, SequenceTrainer

        negatives, size = self.candidates - 1, arguments["per_device_train_batch_size"]
        if negatives > size:
            raise ValueError(
                f"negatives={negatives} is more than a batch has: the pair's own rejected response and"
                f" {size - 1} of other prompts; raise training.batch_size"
            )
        trainer = preference(SequenceTrainer, network, tokenizer, examples, {**arguments, "beta": self.beta})
        trainer.tau, trainer.reference = float(self.tau), self.with_reference
        trainer.data_collator = Candidates(trainer.data_collator, negatives)
        trainer.precompute_ref_logps = True  # TRL's own pass over a batch is told the reference's values
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
                f"negatives must be at most {vocabulary - 1}, one less than the vocabulary, got {negatives}"
            )
        source = self.source if self.source in ("unigram", "model") else "uniform"
        trainer = supervised(TokenTrainer, part(self.on, examples), network, tokenizer, examples, arguments)
        log_unigram = None
        if source == "unigram":
            assert trainer.train_dataset is not None
            counts = torch.ones(vocabulary)  # every token can be drawn
            for row in trainer.train_dataset["labels"]:
                labels = torch.tensor(row[1:])
                counts += torch.bincount(labels[labels != -100], minlength=vocabulary)
            log_unigram = counts.log()
        trainer.contrast = TokenContrast(float(self.tau), negatives, source, arguments["seed"], log_unigram)
        return trainer

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """At token level the tokens with a label, each a term; else the responses, a prompt a term."""
        if self.level == "token":
            targets = inputs["labels"] != -100
            return Scored(targets, list(range(len(targets))), targets[:, 1:].sum(1).tolist())
        prompts, columns = inputs["grades"].shape
        return Scored(inputs["completion_mask"].bool(), [*range(prompts)] * columns, [1] * prompts)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """The loss summed over the tokens, or over the prompts, of a batch, in nats."""
        if self.level == "token":
            return own_loss(trainer, inputs, num_items_in_batch=torch.tensor(1))
        return own_loss(trainer, inputs) * len(inputs["grades"])
