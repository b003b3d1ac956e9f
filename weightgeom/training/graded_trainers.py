"""TRL's trainers with the graded contrastive loss in place of their own; everything else is TRL's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import entropy_from_logits

from weightgeom.compat.fused_head import FusedOutputs, first_rows, with_fused_head
from weightgeom.compat.trainers import log_pairs
from weightgeom.training.graded_loss import Contrasted, Draws, TokenContrast, graded_loss, score_gradient
from weightgeom.training.sharpness import (
    alternatives,
    evenly_spaced,
    is_logged_step,
    log_prob_gradient,
    log_sharpness,
    sharpness_sums,
)


def is_logged(trainer: Any) -> bool:
    """Whether the current computation is a training step that TRL logs."""
    return trainer.model.training and is_logged_step(
        trainer.args, trainer.state, trainer.state.global_step + 1
    )


class TokenTrainer(SFTTrainer):
    """An `SFTTrainer` whose per-token loss is the graded one; set `contrast` before use.

    TRL's loss is minus the mean log-probability returned by the model's fused head. The fused head here
    returns minus the graded losses instead, from one ordinary forward pass.
    """

    contrast: TokenContrast

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the graded per-token losses, in nats."""

        def graded(labels: Tensor, **named: Any) -> FusedOutputs:
            outputs = model(**named)
            mask = labels[:, 1:] != -100
            logits, targets = outputs.logits[:, :-1][mask], labels[:, 1:][mask]
            draws = Draws(self.state.global_step, named["input_ids"], labels)
            losses, contrasted = self.contrast.losses(logits, targets, draws)
            with torch.no_grad():
                self._log_sharpness(contrasted)
                diagnostics = entropy_from_logits(logits), logits.argmax(-1) == targets
            log_probs, entropy, is_top1 = (
                values.new_zeros(mask.shape).masked_scatter(mask, values)
                for values in (-losses, *diagnostics)
            )
            return FusedOutputs(log_probs, mask, entropy, is_top1, aux_loss=outputs.get("aux_loss"))

        network: Any = with_fused_head(model, graded)
        return super().compute_loss(network, inputs, return_outputs, num_items_in_batch)

    def _log_sharpness(self, contrasted: Contrasted) -> None:
        if not is_logged(self):
            return
        subset = evenly_spaced(len(contrasted.scores))
        weights = None if contrasted.log_weights is None else contrasted.log_weights[subset]
        gradient = score_gradient(
            contrasted.scores[subset], contrasted.grades[subset], self.contrast.tau, weights
        )
        log_sharpness(self, sharpness_sums(gradient, contrasted.target[subset]))


class SequenceTrainer(DPOTrainer):
    """A `DPOTrainer` whose loss is the graded one over more than two responses; set `tau` and `reference`.

    The log-probabilities of policy and reference come from TRL's own passes; TRL's own loss of the pairs is
    computed only for the metrics that it logs.
    """

    tau: float
    reference: bool

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The graded loss, the mean over prompts, in nats."""
        rows = {name: value for name, value in inputs.items() if name != "grades"}
        grades, prompts = inputs["grades"], len(inputs["grades"])
        given = {name: value for name, value in rows.items() if name != "completion_mask"}
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
        outputs = model(**given, use_cache=False, labels=labels, fused_lm_head=True)
        log_probs = outputs.log_probs.sum(1)
        reference = torch.zeros_like(log_probs)
        if self.reference:
            # Without a reference model, TRL disables the policy's adapter here.
            reference = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, rows))
        scores = self.beta * (log_probs - reference) if self.reference else log_probs
        scores = scores.unflatten(0, (-1, prompts)).T
        loss = graded_loss(scores, grades.to(scores), self.tau).mean()
        self._log_pairs(outputs, rows, reference, prompts)
        self._log_sharpness(model, given, rows["completion_mask"], scores.detach(), grades)
        return (loss, outputs) if return_outputs else loss

    def _log_pairs(self, outputs: Any, rows: dict[str, Tensor], reference: Tensor, prompts: int) -> None:
        """Compute and log TRL's metrics of the batch's pairs."""
        chosen, rejected, *_ = reference.split(prompts)
        pairs = {name: value[: 2 * prompts] for name, value in rows.items()}
        known = {**pairs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        log_pairs(self, first_rows(outputs, 2 * prompts), known)

    def _log_sharpness(
        self, model: Any, given: dict[str, Tensor], mask: Tensor, scores: Tensor, grades: Tensor
    ) -> None:
        """Log the sharpness on the first pair, in a second pass, because the fused head returns no logits."""
        if not is_logged(self):
            return
        pair = [0, len(grades)]
        with torch.no_grad():
            logits = model(**{name: value[pair] for name, value in given.items()}, use_cache=False).logits
        targets, where = given["input_ids"][pair, 1:], mask[pair, 1:].bool()
        by_candidate = score_gradient(scores[:1], grades[:1].to(scores), self.tau)[0, :2]
        coefficient = by_candidate[:, None].expand(where.shape)[where]
        subset = evenly_spaced(len(coefficient))
        logits, targets = logits[:, :-1][where][subset], targets[where][subset]
        gradient = log_prob_gradient(logits, targets, coefficient[subset].to(logits))
        of_scores = score_gradient(scores, grades.to(scores), self.tau)
        first = torch.zeros(len(scores), dtype=torch.long, device=scores.device)  # the chosen response
        contrasted = float(alternatives(of_scores, first).mean())
        log_sharpness(self, sharpness_sums(gradient, targets, contrasted))


@dataclass(frozen=True)
class Candidates:
    """A collator of the responses to each prompt, column by column: chosen, rejected, other prompts' chosen.

    `collate` is TRL's collator. The other prompts are the next examples of the batch, whose order is random;
    a batch with fewer examples than `negatives`, such as an epoch's last, has fewer columns. A negative that
    equals the chosen response has its grade.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    negatives: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The rows of all columns, and the grades by prompt and column."""
        prompts = len(examples)
        chosen = [example["chosen_ids"] for example in examples]
        shifts = range(1, min(self.negatives, prompts))
        columns = [
            chosen,
            [example["rejected_ids"] for example in examples],
            *(chosen[shift:] + chosen[:shift] for shift in shifts),
        ]
        rows = [
            {"prompt_ids": example["prompt_ids"], "chosen_ids": response, "rejected_ids": response}
            for column in columns
            for example, response in zip(examples, column, strict=True)
        ]
        batch = {name: value[: len(rows)] for name, value in self.collate(rows).items()}
        same = [[column[i] == chosen[i] for column in columns] for i in range(prompts)]
        return {**batch, "grades": torch.tensor(same, dtype=torch.float32)}
