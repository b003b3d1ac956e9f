"""What happens between the steps of a training: checkpoints, live metrics, and a stop when it diverges.

Checkpoints (`step-N`) are for measuring and stay; states (`checkpoint-N`) are the library's own, to resume
from, and go when the training is complete. A state counts when it holds SEAL, which is written last.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from weightgeom.adapters import is_adapter
from weightgeom.interfaces import Log
from weightgeom.interruption import Interrupted, Wanted
from weightgeom.residual import Architecture, ResidualMatrix
from weightgeom.running_sums import restore_running_sums, save_running_sums
from weightgeom.weights import open_params, opened

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

log = logging.getLogger(__name__)
STATE, SEAL = "checkpoint-", "sealed.json"
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


class States(TrainerCallback):
    """Keeps the newest states to resume from: those that the library writes, and one whenever it is wanted.

    Where a stop is wanted, it raises Interrupted once that state is sealed.
    """

    def __init__(self, trainer: Any, directory: Path, start: Path | None, keep: int, wanted: Wanted) -> None:
        self.trainer = trainer
        self.directory = directory
        self.start = start
        self.keep = keep
        self.wanted = wanted
        self.stop = False

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Go on with the sums of the state that is resumed from; the library has just set its own to 0."""
        if self.start is not None:
            restore_running_sums(self.trainer, self.start)

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Look what is wanted; the library logs this step before it saves the state."""
        wanted = self.wanted()
        if wanted is not None:
            control.should_save, self.stop = True, wanted == "stop"
        if control.should_training_stop:
            control.should_save = False  # there is nothing left to resume

    def on_save(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Seal the state that the library has written, then delete those that are too old."""
        written = self.directory / f"{STATE}{state.global_step}"
        save_running_sums(self.trainer, written)
        seal(written)
        for old in states(self.directory)[self.keep :]:
            shutil.rmtree(old)
        if self.stop:
            raise Interrupted(f"stopped after step {state.global_step}, whose state is saved")


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


def states(directory: Path) -> list[Path]:
    """The states in `directory`, whole or not, the newest first."""
    return sorted(directory.glob(f"{STATE}*"), key=_step, reverse=True)


def seal(state: Path) -> None:
    """Write the state's files through to the disk, then SEAL with their sizes; mutates the directory."""
    _synchronize(state)
    sizes = {path.name: path.stat().st_size for path in sorted(state.iterdir())}
    temporary = state / f".{SEAL}.tmp"
    temporary.write_text(json.dumps(sizes))
    _synchronize(state)
    temporary.rename(state / SEAL)


def resumable(directory: Path, saved: Collection[int]) -> Path | None:
    """The newest whole state whose training has left all checkpoints at the steps `saved` until then."""
    for state in states(directory):
        flaw = _flaw(state)
        missing = [
            step for step in saved if step <= _step(state) and not (directory / f"step-{step}").is_dir()
        ]
        if not flaw and not missing:
            log.info("resuming from step %d", _step(state))
            return state
        log.warning(
            "%s is of no use: %s; trying an older one", state, flaw or f"step-{missing[0]} is missing"
        )
    return None


@contextmanager
def restored(network: "PreTrainedModel", state: Path | None, architecture: Architecture) -> Iterator[None]:
    """Give `network`, which is mutated, the weights of a state, in whose presence the rest can be resumed.

    The library leaves out the weights that have another name on disk (GPT-NeoX: the unembedding), and
    warns of it; within the context it does not. The library restores all of an adapter by itself.
    """
    if state is None or is_adapter(state):
        yield
        return
    weights = open_params(state, architecture)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(weights[name])
    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(_other_names)
    try:
        yield
    finally:
        logger.removeFilter(_other_names)


def _other_names(record: logging.LogRecord) -> bool:
    return "keys in the checkpoint model loaded" not in record.getMessage()


def discard(directory: Path, state: Path | None, only_states: bool = False) -> None:
    """Delete what a training left in `directory` beyond `state`: all of it, if that is None."""
    last = -1 if state is None else _step(state)
    patterns = [f"{STATE}*"] if only_states else [f"{STATE}*", "step-*", ".step-*.tmp"]
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        if path.name.startswith(".") or _step(path) > last:
            shutil.rmtree(path)


def _flaw(state: Path) -> str:
    """What is wrong with a state; empty if nothing is."""
    try:
        for name, size in json.loads((state / SEAL).read_text()).items():
            found = (state / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        step = json.loads((state / "trainer_state.json").read_text())["global_step"]
        for path in state.glob("*.safetensors"):
            opened(path)
    except FileNotFoundError as error:
        return f"it lacks {Path(str(error.filename)).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return "" if step == _step(state) else f"trainer_state.json is of step {step}"


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _synchronize(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
