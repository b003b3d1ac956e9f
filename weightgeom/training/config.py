"""Training settings: length, batches, optimizer, checkpoints and the matched budget."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.examples import Examples
from weightgeom.training.lora import Lora


@dataclass(frozen=True)
class Training:
    """How long and how fast: AdamW in fp32, linear warm-up, then the `schedule` of the learning rate.

    Checkpoints are kept at steps 0, 1, 2, 4, 8, ... and the last. `max_length` is in tokens: the
    length of a packed sequence of text, and the longest prompt + response.

    `match` is what trainings are to have in common: `steps`, or the `tokens` that went through the model
    (padding left out), the `delta_norm` ‖θ_t − θ_0‖_F over all weights, or the `accuracy` of preference on
    held-out pairs. The training stops when that reaches `target`, after `steps` at the latest; a `schedule`
    falls as if there were no target. A training that was interrupted goes on from the last of its `keep`
    newest states, bit for bit on the CPU: one every `save_every` steps, and the one of a stop. With a
    rank in `lora` the weights are frozen, an adapter is trained on them, and checkpoints are adapters as
    PEFT saves them.
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
    log_gradients: bool = False  # norms of the gradient by kind of matrix: seven curves more
    tf32: bool = False  # on a GPU: faster and less exact matrix products
    workers: int = Field(default=0, ge=0)  # processes that load the batches
    save_every: int | None = Field(default=None, ge=1)  # steps between states to resume from
    keep: int = Field(default=2, ge=1)  # how many of these states are kept
    match: Literal["steps", "tokens", "delta_norm", "accuracy"] = "steps"
    target: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # of `match`, but for steps
    match_every: int = Field(default=5, ge=1)  # steps between two measurements of the accuracy
    lora: Lora = Field(default_factory=Lora)

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.match != "steps" and self.target is None:
            raise ValueError(f"match={self.match} needs a target: give training.target")
        if self.match == "accuracy" and self.target is not None and self.target > 1:
            raise ValueError(f"target is an accuracy of {self.target:g}, and 1 is the highest")
        if self.lora.r is not None and self.log_gradients:
            raise ValueError(
                "log_gradients takes the gradients of whole matrices, which lora.r freezes: leave one out"
            )

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data lack what the match needs."""
        if self.match == "accuracy" and not examples.heldout_pairs:
            raise ValueError(f"match=accuracy needs held-out preference pairs, and {examples.name} has none")

    def save_steps(self) -> list[int]:
        """The steps of the checkpoints."""
        powers = [2**power for power in range(self.steps.bit_length()) if 2**power < self.steps]
        return [0, *powers, self.steps]

    def checkpoints_size(self, weights: float, trained: float, from_random: bool) -> tuple[float, float]:
        """Bytes on disk of the checkpoints that stay, and at the highest of the states to resume from.

        `weights` has the bytes of the network, `trained` of what the optimizer keeps two moments of.
        """
        each = weights if self.lora.r is None else trained
        steps = [step for step in self.save_steps() if step or from_random]
        states = 0 if self.save_every is None else min(self.keep + 1, self.steps // self.save_every)
        return len(steps) * each, states * (each + 2 * trained)

    def arguments(self, directory: Path, seed: int, device: str) -> dict[str, Any]:
        """The arguments of a TRL trainer: fp32, no tracking, checkpoints of its own only to resume."""
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
            "save_strategy": "no" if self.save_every is None else "steps",
            "save_steps": self.save_every or 500,  # the default, unused
            "include_num_input_tokens_seen": "non_padding",
            "logging_steps": self.log_every,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": device != "cpu",
            "dataloader_num_workers": self.workers,
        }
