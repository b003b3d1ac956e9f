"""Sharpness of an objective: the participation ratio and the target's energy share of its logit gradient."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TrainerCallback

from weightgeom.compat.trainers import add_metric, prepared
from weightgeom.interfaces import Scored

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

MAX_TOKENS = 256  # per batch


def participation_ratio(gradient: Float[Tensor, "token candidate"]) -> Float[Tensor, " token"]:
    """(Σ g_i²)² / Σ g_i⁴: 1 for a gradient with a single entry, the number of entries if all are equal."""
    energy = (gradient / gradient.abs().amax(1, keepdim=True)).square()  # unscaled, g⁴ would underflow
    return energy.sum(1).square() / energy.square().sum(1)


def target_energy(
    gradient: Float[Tensor, "token candidate"], target: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """g_target² / Σ g_i², the target's share of the gradient's energy, in [0, 1]."""
    energy = (gradient / gradient.abs().amax(1, keepdim=True)).square()
    return energy.gather(1, target[:, None])[:, 0] / energy.sum(1)


def log_prob_gradient(
    logits: Float[Tensor, "token vocabulary"],
    targets: Int[Tensor, " token"],
    coefficient: Float[Tensor, " token"],
) -> Float[Tensor, "token vocabulary"]:
    """The logit gradient c (onehot - p) of a loss with dL / d log p(target) = c, the `coefficient`."""
    gradient = -torch.softmax(logits, 1)
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    return coefficient[:, None] * gradient


def sharpness(
    logits: Float[Tensor, "token vocabulary"],
    targets: Int[Tensor, " token"],
    coefficient: Float[Tensor, " token"],
) -> dict[str, float]:
    """Mean participation ratio and target energy of a loss of log-probabilities, such as CE and DPO.

    `coefficient` is dL / d log p(target). Tokens with a zero gradient have no sharpness and are excluded; if
    all are zero, the result is empty.
    """
    sums = sharpness_sums(log_prob_gradient(logits, targets, coefficient), targets)
    return sharpness_means(sums)


def sharpness_sums(
    gradient: Float[Tensor, "token candidate"], target: Int[Tensor, " token"]
) -> Float[Tensor, "3"]:
    """Sums of participation ratio and target energy, and the count, over tokens with a nonzero gradient."""
    nonzero = gradient.ne(0).any(1)
    gradient, target = gradient[nonzero], target[nonzero]
    ratio, energy = participation_ratio(gradient), target_energy(gradient, target)
    return torch.stack([ratio.sum(), energy.sum(), nonzero[nonzero].to(gradient).sum()])


def sharpness_means(sums: Float[Tensor, "3"]) -> dict[str, float]:
    """The means by metric name; empty without tokens."""
    ratio, energy, count = sums.tolist()
    return {"participation_ratio": ratio / count, "target_energy": energy / count} if count else {}


def evenly_spaced(count: int) -> list[int]:
    """At most `MAX_TOKENS` evenly spaced indices of `count` tokens."""
    return (
        [index * count // MAX_TOKENS for index in range(MAX_TOKENS)]
        if count > MAX_TOKENS
        else list(range(count))
    )


def is_logged_step(args: "TrainingArguments", state: "TrainerState", step: int) -> bool:
    """Whether the trainer logs this step."""
    return step % max(1, state.logging_steps) == 0 or (step == 1 and args.logging_first_step)


def log_sharpness(trainer: Any, sums: Float[Tensor, "3"]) -> None:
    """Add the means over all processes to the next log of a TRL trainer; mutates its metrics."""
    for name, value in sharpness_means(trainer.accelerator.gather(sums[None]).sum(0)).items():
        add_metric(trainer, name, value)


class Sharpness(TrainerCallback):
    """Logs the sharpness on the first training examples, for a TRL trainer of a loss of log-probabilities.

    The examples are the same at every step, so the curve reflects the training and not the batches. No
    random number is drawn: the training is bit-identical to one without this callback. `store` takes the
    means where the trainer has a method for the values it logs next, such as TRL's `store_metrics`.
    """

    def __init__(
        self,
        trainer: Any,
        scored: Callable[[Mapping[str, Tensor]], Scored],
        examples: int = 4,
        store: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.store = store
        self.trainer = trainer
        self.scored = scored
        self.examples = examples

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Measure the sharpness if this step is logged."""
        if not is_logged_step(args, state, state.global_step):
            return
        model, data = kwargs["model"], self.trainer.train_dataset
        batch = self.trainer.data_collator([data[i] for i in range(min(self.examples, len(data)))])
        inputs = prepared(self.trainer, batch)
        scored = self.scored(inputs)
        ids, attention = scored.read(inputs)
        mask = scored.targets[:, 1:]
        training = model.training
        model.eval()  # dropout would draw from the training's random generator
        with torch.no_grad():
            outputs = model(input_ids=ids, attention_mask=attention, use_cache=False)
        model.train(training)
        targets = ids[:, 1:][mask]
        subset = evenly_spaced(len(targets))
        logits, targets = outputs.logits[:, :-1][mask][subset], targets[subset]
        gradient = log_prob_gradient(logits, targets, torch.ones_like(logits[:, 0]))
        sums = sharpness_sums(gradient, targets)
        if self.store is None:
            log_sharpness(self.trainer, sums)
        else:
            self.store(sharpness_means(self.trainer.accelerator.gather(sums[None]).sum(0)))
