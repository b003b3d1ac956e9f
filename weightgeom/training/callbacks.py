"""What happens between the steps of a training: checkpoints, live metrics, and a stop when it diverges.

Checkpoints (`step-N`) are for measuring and stay; states (`checkpoint-N`) are the library's own, to resume
from, and go when the training is complete. A state counts when it holds SEAL, which is written last.
"""

import logging
import math
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from weightgeom.interfaces import Log
from weightgeom.models.residual import ResidualMatrix
from weightgeom.training.resuming import _synchronize

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )


log = logging.getLogger(__name__)
# What TRL logs that is worth a curve; the rest is derived from these or constant.
CURVES = (
    "loss",
    "grad_norm",
    "learning_rate",
    "entropy",
    "mean_token_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "participation_ratio",
    "target_energy",
)


class Checkpoints(TrainerCallback):
    """Saves checkpoints at the given steps and hands on the metrics that TRL logs."""

    def __init__(
        self,
        directory: Path,
        steps: Collection[int],
        tokenizer: "PreTrainedTokenizerBase",
        log_metrics: Log,
        first_loss: float | None,
        keep_start: bool,
    ) -> None:
        self.directory = directory
        self.steps = steps
        self.tokenizer = tokenizer
        self.log_metrics = log_metrics
        self.first_loss = first_loss
        self.keep_start = keep_start
        self.last: Path | None = None

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Save the start, where no checkpoint holds it yet."""
        if self.keep_start:
            self._save(kwargs["model"], 0)

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Save, if this is one of the steps or the last; tell how far the training is."""
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
        """Hand on the curves; raise if the loss is not finite, or not what it must be at the first step."""
        logs: dict[str, float] = kwargs["logs"]
        loss = logs.get("loss")
        if loss is None:  # the summary at the end
            return
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged(f"the loss is {loss}", state.global_step))
        if state.global_step == 1 and self.first_loss is not None and abs(loss - self.first_loss) > 1e-3:
            raise RuntimeError(
                f"the first loss is {loss:.4f} instead of {self.first_loss:.4f}:"
                " the reference does not equal the policy at the start"
            )
        self.log_metrics({name: float(logs[name]) for name in CURVES if name in logs}, state.global_step)

    def _save(self, model: "PreTrainedModel", step: int) -> None:
        bad = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
        if bad:
            raise FloatingPointError(self._diverged(f"{bad[0]} holds values that are not finite", step))
        final = self.directory / f"step-{step}"
        temporary = self.directory / f".step-{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _synchronize(temporary)
        temporary.rename(final)  # atomic: a checkpoint is whole or not there
        self.last = final

    def _diverged(self, what: str, step: int) -> str:
        kept = f"the last good checkpoint is {self.last}" if self.last else "no checkpoint was good"
        return f"training diverged: {what} at step {step}; {kept}; lower the learning rate"


class GradientNorms(TrainerCallback):
    """Logs the norm of the gradient of each kind of matrix, before it is clipped, when TRL logs."""

    def __init__(self, matrices: Sequence[ResidualMatrix], log_metrics: Log) -> None:
        self.matrices = matrices
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
        """Take the norms, clipped as the gradient is by now, if the step that follows is logged."""
        step = state.global_step + 1
        if step > 1 and step % int(args.logging_steps):
            return
        gradients = {
            name: weight.grad
            for name, weight in kwargs["model"].named_parameters()
            if weight.grad is not None
        }
        squares: dict[str, torch.Tensor] = {}
        for matrix in self.matrices:
            if matrix.parameter in gradients:
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
        """Log them, with the clipping undone by the norm of the whole gradient that TRL logs."""
        logs: dict[str, float] = kwargs["logs"]
        if "grad_norm" in logs and self.norms:
            shrunk = max(1.0, (logs["grad_norm"] + 1e-6) / args.max_grad_norm)  # as torch clips
            metrics = {f"grad_norm/{kind}": shrunk * norm for kind, norm in self.norms.items()}
            self.log_metrics(metrics, state.global_step)
