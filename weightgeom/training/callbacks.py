"""Callbacks between training steps: checkpoints, live metrics, and an error when the training diverges.

Checkpoints (`step-N`) are measured and kept. Resumable states (`checkpoint-N`) are written by transformers
and deleted once the training is complete; a state is valid if it contains SEAL, which is written last.
"""

import logging
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from weightgeom.interfaces import Log
from weightgeom.models.experts import unstacked
from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.training.ranks import from_first, gathered_weights, part, whole
from weightgeom.training.resuming import flush_to_disk

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )


log = logging.getLogger(__name__)
# TRL's other metrics are constant or follow from these.
LIVE_METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "entropy",
    "mean_token_accuracy",
    "reward",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "participation_ratio",
    "target_energy",
    "alternatives",
)


class CheckpointWriter(TrainerCallback):
    """Saves checkpoints at the given steps and passes on the metrics that TRL logs."""

    def __init__(
        self,
        directory: Path,
        steps: Collection[int],
        tokenizer: "PreTrainedTokenizerBase",
        log_metrics: Log,
        first_loss: float | None,
        router_weight: float,
        keep_start: bool,
    ) -> None:
        self.directory = directory
        self.steps = steps
        self.tokenizer = tokenizer
        self.log_metrics = log_metrics
        self.first_loss = first_loss
        self.router_weight = router_weight
        self.keep_start = keep_start
        self.last: Path | None = None

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Save step 0, unless an existing checkpoint is the start."""
        if self.keep_start:
            self._save(kwargs["model"], 0)

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Report progress, and save a checkpoint at the given steps and at the last."""
        self.log_metrics({}, state.global_step)
        if state.global_step in self.steps or control.should_training_stop:
            self._save(kwargs["model"], state.global_step)

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Pass on the curves; raise if the loss is not finite, or is wrong at the first step."""
        logs: dict[str, float] = kwargs["logs"]
        loss = logs.get("loss")
        if loss is None:  # the summary at the end of training
            return
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged(f"the loss is {loss}", state.global_step))
        if state.global_step == 1 and self.first_loss is not None:
            expected = self.first_loss + self.router_weight * logs.get("aux_loss", 0.0)
            if abs(loss - expected) > 1e-3:
                raise RuntimeError(
                    f"the first loss is {loss:.4f} instead of {expected:.4f}:"
                    " the reference does not equal the policy at the start"
                )
        self.log_metrics(
            {name: float(logs[name]) for name in LIVE_METRICS if name in logs}, state.global_step
        )

    def _save(self, model: "PreTrainedModel", step: int) -> None:
        weights = model.named_parameters()
        bad = [name for name, weight in weights if not bool(torch.isfinite(part(weight)).all())]
        if bad:
            raise FloatingPointError(self._diverged(f"{bad[0]} has values that are not finite", step))
        gathered = gathered_weights(model, self.directory)
        self.last = from_first(lambda: self._write(model, step, gathered))

    def _write(self, model: "PreTrainedModel", step: int, weights: dict[str, torch.Tensor] | None) -> Path:
        final = self.directory / f"step-{step}"
        temporary = self.directory / f".step-{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            model.save_pretrained(temporary, state_dict=weights)
            self.tokenizer.save_pretrained(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush_to_disk(temporary)
        temporary.rename(final)  # atomic: a checkpoint is complete or absent
        return final

    def _diverged(self, symptom: str, step: int) -> str:
        kept = f"the last good checkpoint is {self.last}" if self.last else "no good checkpoint was saved"
        return f"training diverged: {symptom} at step {step}; {kept}; lower training.learning_rate"


class GradientNorms(TrainerCallback):
    """Logs the gradient norm of each kind of matrix, before clipping, at the steps that TRL logs."""

    def __init__(self, architecture: Architecture, log_metrics: Log) -> None:
        self.architecture = architecture
        self.log_metrics = log_metrics
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Compute the norms of the gradients, already clipped here, if TRL logs this step."""
        step = state.global_step + 1
        if step > 1 and step % int(args.logging_steps):
            return
        matrices_of: dict[str, list[ResidualMatrix]] = {}
        for matrix in self.architecture.matrices:
            matrices_of.setdefault(matrix.parameter, []).append(matrix)
        squares: dict[str, torch.Tensor] = {}
        for name, weight in kwargs["model"].named_parameters():
            if weight.grad is None:
                continue
            # One at a time: a process need not have the memory for all gradients of a sharded network.
            gradients = unstacked({name: whole(weight.grad)}, self.architecture.stacks)
            for matrix in (matrix for each in gradients for matrix in matrices_of.get(each, ())):
                square = torch.linalg.vector_norm(matrix.of(gradients)).square()
                squares[matrix.kind] = squares.get(matrix.kind, torch.zeros_like(square)) + square
        self.norms = {kind: math.sqrt(float(square)) for kind, square in squares.items()}

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Log the norms, with the clipping undone by the total gradient norm that TRL logs."""
        logs: dict[str, float] = kwargs["logs"]
        if "grad_norm" in logs and self.norms:
            clipped_by = max(1.0, (logs["grad_norm"] + 1e-6) / args.max_grad_norm)  # torch's formula
            metrics = {f"grad_norm/{kind}": clipped_by * norm for kind, norm in self.norms.items()}
            self.log_metrics(metrics, state.global_step)
