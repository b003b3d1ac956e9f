"""Training by the trainers of TRL, with fp32 checkpoints at log-spaced steps."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.interfaces import Examples, Log, Objective, Trajectory
from weightgeom.model import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How long and how fast: AdamW in fp32, linear warm-up, then the `schedule` of the learning rate.

    Checkpoints are kept at steps 0, 1, 2, 4, 8, ... and the last. `max_length` is in tokens: the
    length of a packed sequence of text, and the longest prompt + response.
    """

    steps: int = Field(default=64, ge=1)
    batch_size: int = Field(default=24, ge=1)
    accumulate: int = Field(default=1, ge=1)  # batches per optimizer step
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=0, ge=0)  # steps
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # the last two fall to 0
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_length: int = Field(default=96, ge=2)
    log_every: int = Field(default=5, ge=1)  # steps
    tf32: bool = False  # on a GPU: faster and less exact matrix products

    def save_steps(self) -> list[int]:
        """The steps of the checkpoints."""
        powers = [2**power for power in range(self.steps.bit_length()) if 2**power < self.steps]
        return [0, *powers, self.steps]

    def arguments(self, directory: Path, seed: int, device: str) -> dict[str, Any]:
        """The arguments of a TRL trainer: fp32, no tracking and no checkpoints of its own."""
        return {
            "output_dir": str(directory),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant_with_warmup" if self.schedule == "constant" else self.schedule,
            "warmup_steps": self.warmup,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "max_length": self.max_length,
            "seed": seed,
            "use_cpu": device == "cpu",
            "bf16": False,
            "tf32": self.tf32 if device != "cpu" else None,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": self.log_every,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": device != "cpu",
        }


def fit(
    objective: Objective,
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    training: Training,
    directory: Path,
    *,
    name: str,
    seed: int,
    device: str,
    log_metrics: Log,
    start: Path | None = None,
) -> Trajectory:
    """Train `network`, which is mutated, and leave its checkpoints in `directory`.

    `start` is a checkpoint that already holds step 0; without one the random start is saved too.
    Every checkpoint is an ordinary transformers directory with its tokenizer.

    Raises:
        FloatingPointError: when the loss or a weight is no longer finite; the good checkpoints stay.
        ValueError: if sequences of `max_length` do not fit the model, or nothing is left to train on.
        RuntimeError: if the first loss is not what the objective knows it must be.
    """
    from transformers.trainer_callback import PrinterCallback  # noqa: PLC0415 (heavy)
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from weightgeom.checkpoints import Checkpoints  # noqa: PLC0415 (heavy)

    disable_progress_bar()  # the one of the run is enough
    check_length(training.max_length, getattr(network.config, "max_position_embeddings", None))
    trainer = objective.trainer(network, tokenizer, examples, training.arguments(directory, seed, device))
    checkpoints = Checkpoints(
        directory,
        training.save_steps(),
        tokenizer,
        log_metrics,
        objective.first_loss,
        keep_start=start is None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(checkpoints)
    log.info("training %s for %d steps of %d examples", name, training.steps, training.batch_size)
    with outdated_name_allowed():
        trainer.train()
    return trajectory(directory, name, start)


@contextmanager
def outdated_name_allowed() -> Iterator[None]:
    """Within it there is no warning that TRL asks transformers by a name that is on its way out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def trajectory(directory: Path, name: str, start: Path | None = None) -> Trajectory:
    """The trajectory whose checkpoints `directory` holds, behind `start` as its step 0."""
    steps = {int(path.name.removeprefix("step-")): path for path in directory.glob("step-*")}
    if start is not None:
        steps[0] = start
    return Trajectory(name, dict(sorted(steps.items())), from_random=start is None)
