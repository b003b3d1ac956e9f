"""Training settings: length, batches, optimizer, checkpoints, processes and the matched budget."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.examples import Examples
from weightgeom.training.lora import Lora
from weightgeom.training.optimizers import OPTIMIZERS, Name
from weightgeom.training.ranks import processes

# Of FSDP2: states to resume from are in parts, checkpoints are gathered by `fit`.
SHARDING = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}


@dataclass(frozen=True)
class Training:
    """Training of fp32 weights, with linear warm-up and then the `schedule` of the learning rate.

    `optimizer` is `adamw`, `sgd` (without momentum), `muon` (of the matrices at the residual stream, AdamW of
    all other parameters) or `lion`; all decay weights apart from the gradient except `sgd`.

    Checkpoints are kept at steps 0, 1, 2, 4, 8, ... and the last. `max_length` is in tokens: the
    length of a packed sequence of text, and of the longest prompt + response.

    `match` is the budget to be matched between trainings: `steps`, `tokens` through the model (without
    padding), the `delta_norm` ‖θ_t − θ_0‖_F over all weights, or the preference `accuracy` on held-out pairs.
    The training stops when this quantity reaches `target`, or after `steps`; the learning-rate `schedule`
    ignores the target. An interrupted training resumes from its newest state, bit for bit on the CPU; states
    are saved every `save_every` steps and on a stop, and the `keep` newest are kept. With a rank in `lora`,
    the weights are frozen, an adapter is trained, and checkpoints are adapters in PEFT's format.

    Each of several `processes` has an equal part of every batch, and the gradients are averaged: the update
    is that of one process within rounding. With `shard`, each holds a part of the weights, gradients and
    optimizer state instead of a copy (FSDP2). `precision=bf16` computes in bf16 and keeps the weights, their
    gradients and the optimizer in fp32. `activation_checkpointing` computes activations a second time in the
    backward pass instead of keeping them.
    """

    steps: int = Field(default=64, ge=1)
    batch_size: int = Field(default=24, ge=1)
    accumulate: int = Field(default=1, ge=1)  # batches per optimizer step
    optimizer: Name = "adamw"
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=0, ge=0)  # steps
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear and cosine decay to 0
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_length: int = Field(default=96, ge=2)
    log_every: int = Field(default=5, ge=1)  # steps
    log_gradients: bool = False  # gradient norms by kind of matrix: seven more curves
    tf32: bool = False  # on a GPU: faster, less precise matrix products
    workers: int = Field(default=0, ge=0)  # processes that load the batches
    save_every: int | None = Field(default=None, ge=1)  # steps between resumable states
    keep: int = Field(default=2, ge=1)  # number of resumable states kept
    match: Literal["steps", "tokens", "delta_norm", "accuracy"] = "steps"
    target: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # of `match`, unless it is steps
    match_every: int = Field(default=5, ge=1)  # steps between measurements of the accuracy
    lora: Lora = Field(default_factory=Lora)
    processes: int = Field(default=1, ge=1)
    shard: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse inconsistent settings."""
        if self.match != "steps" and self.target is None:
            raise ValueError(f"match={self.match} needs a target: set training.target")
        if self.match == "accuracy" and self.target is not None and self.target > 1:
            raise ValueError(f"target must be at most 1 for match=accuracy, got {self.target:g}")
        if self.lora.r is not None and self.log_gradients:
            raise ValueError(
                "log_gradients needs the gradients of whole matrices, which lora.r freezes: set only one"
            )
        if self.lora.r is not None and self.orthogonal:
            raise ValueError(
                f"optimizer={self.optimizer} orthogonalises the updates of whole matrices, which lora.r"
                " freezes: set only one"
            )
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide among {self.processes} processes: set"
                f" training.batch_size={self.processes * -(-self.batch_size // self.processes)}"
            )
        if self.shard and self.processes == 1:
            raise ValueError("shard=true needs several processes: set training.processes, or shard=false")
        if self.shard and self.optimizer == "muon":
            raise ValueError(
                "optimizer=muon orthogonalises whole matrices, of which shard=true gives each process a part:"
                " set only one"
            )
        if self.shard and self.lora.r is not None:
            raise ValueError("lora.r trains few weights, which shard=true does not divide: set only one")

    @property
    def of_result(self) -> "Training":
        """The settings that the result depends on by more than rounding: those of one process."""
        return replace(self, processes=1, shard=False, activation_checkpointing=False)

    @property
    def orthogonal(self) -> bool:
        """Whether the optimizer gives the updates of matrices singular values of nearly one size.

        Of such an update of full rank, every subspace of dimension k has the share k/d: no measurement of
        shares says anything about the model.
        """
        return OPTIMIZERS[self.optimizer].orthogonal

    @property
    def forecast(self) -> str:
        """The quantity of the probe `moments` that stands for the optimizer's update; "" for none."""
        return OPTIMIZERS[self.optimizer].forecast

    def check(self, examples: Examples) -> None:
        """Raise ValueError if `match` needs examples that the data lack."""
        if self.match == "accuracy" and not examples.heldout_pairs:
            raise ValueError(f"match=accuracy needs held-out preference pairs, but {examples.name} has none")

    def save_steps(self) -> list[int]:
        """The steps of the checkpoints."""
        powers = [2**power for power in range(self.steps.bit_length()) if 2**power < self.steps]
        return [0, *powers, self.steps]

    def checkpoints_size(self, weights: float, trained: float, from_random: bool) -> tuple[float, float]:
        """Bytes on disk of the kept checkpoints, and at peak of the resumable states.

        `weights` is the size of the network in bytes, `trained` that of its trainable parameters.
        """
        each = weights if self.lora.r is None else trained
        steps = [step for step in self.save_steps() if step or from_random]
        states = 0 if self.save_every is None else min(self.keep + 1, self.steps // self.save_every)
        return len(steps) * each, states * (each + OPTIMIZERS[self.optimizer].moments * trained)

    def arguments(self, directory: Path, seed: int, device: str) -> dict[str, Any]:
        """Arguments of a TRL trainer: no tracking, TRL's own checkpoints only as resumable states.

        They are those of one of the processes of the current training.
        The `optim` of an optimizer that transformers lacks is AdamW's: `fit` gives the trainer its own.
        """
        sharded = self.shard and processes() > 1
        return {
            "output_dir": str(directory),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size // processes(),
            "gradient_accumulation_steps": self.accumulate,
            "learning_rate": self.learning_rate,
            "optim": OPTIMIZERS[self.optimizer].transformers or OPTIMIZERS["adamw"].transformers,
            "lr_scheduler_type": "constant_with_warmup" if self.schedule == "constant" else self.schedule,
            "warmup_steps": self.warmup,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "max_length": self.max_length,
            "seed": seed,
            "use_cpu": device == "cpu",
            "bf16": self.precision == "bf16",
            "tf32": self.tf32 if device != "cpu" else None,
            "activation_checkpointing": self.activation_checkpointing,
            **({"fsdp": True, "fsdp_config": SHARDING} if sharded else {}),
            "save_strategy": "no" if self.save_every is None else "steps",
            "save_steps": self.save_every or 500,  # 500 is TRL's default, unused
            "include_num_input_tokens_seen": "non_padding",
            "logging_steps": self.log_every,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": device != "cpu",
            "dataloader_num_workers": self.workers,
        }
