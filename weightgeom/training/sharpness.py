"""Sharpness of an objective: participation ratio, target energy and alternatives of its logit gradient."""

from collections.abc import Callable, Mapping
from math import isnan
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


def alternatives(
    gradient: Float[Tensor, "*batch candidate"], target: Int[Tensor, " *batch"]
) -> Float[Tensor, " *batch"]:
    """(Σ g_i)² / Σ g_i² over the candidates whose gradient has the sign opposite to the target's.

    The effective number of alternatives that the target is contrasted with: 1 for a pair, up to V - 1 for
    the next token. Unlike the participation ratio, which is over tokens, it is over the candidates of the
    loss, so that DPO and cross-entropy differ. 0 where no gradient is opposite. Source: ours.
    """
    sign = gradient.gather(-1, target[..., None]).sign()
    opposite = (-sign * gradient).clamp(min=0)
    opposite = opposite / opposite.amax(-1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
    return (opposite.sum(-1).square() / opposite.square().sum(-1)).nan_to_num(0)


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
    """The means of a loss of log-probabilities over its tokens, such as CE.

    `coefficient` is dL / d log p(target). Tokens with a zero gradient have no sharpness and are excluded; if
    all are zero, the result is empty.
    """
    sums = sharpness_sums(log_prob_gradient(logits, targets, coefficient), targets)
    return sharpness_means(sums)


def sharpness_sums(
    gradient: Float[Tensor, "token candidate"],
    target: Int[Tensor, " token"],
    contrasted: float | None = None,
) -> Float[Tensor, "4"]:
    """Sums over tokens with a nonzero gradient, and their number.

    Of the participation ratio, the target energy and the alternatives; `contrasted` is the number of the
    latter for every token, where a loss contrasts whole responses.
    """
    nonzero = gradient.ne(0).any(1)
    gradient, target = gradient[nonzero], target[nonzero]
    ratio, energy = participation_ratio(gradient), target_energy(gradient, target)
    count = nonzero[nonzero].to(gradient).sum()
    others = alternatives(gradient, target).sum() if contrasted is None else contrasted * count
    return torch.stack([ratio.sum(), energy.sum(), others, count])


def sharpness_means(sums: Float[Tensor, "4"]) -> dict[str, float]:
    """The means by metric name; empty without tokens, and no alternatives where they are not known."""
    *values, count = sums.tolist()
    if not count:
        return {}
    names = ("participation_ratio", "target_energy", "alternatives")
    return {name: value / count for name, value in zip(names, values, strict=True) if not isnan(value)}


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


def log_sharpness(trainer: Any, sums: Float[Tensor, "4"]) -> None:
    """Add the means over all processes to the next log of a TRL trainer; mutates its metrics."""
    for name, value in sharpness_means(trainer.accelerator.gather(sums[None]).sum(0)).items():
        add_metric(trainer, name, value)


class Sharpness(TrainerCallback):
    """Logs the sharpness on the first training examples, for a TRL trainer of a loss of log-probabilities.

    The examples are the same at every step, so the curve reflects the training and not the batches. No
    random number is drawn: the training is bit-identical to one without this callback. `store` takes the
    means where the trainer has a method for the values it logs next, such as TRL's `store_metrics`.
    `contrasted` is as in `sharpness_sums`: 1 for DPO, NaN where a loss contrasts no responses with others.
    """

    def __init__(
        self,
        trainer: Any,
        scored: Callable[[Mapping[str, Tensor]], Scored],
        examples: int = 4,
        store: Callable[[dict[str, float]], None] | None = None,
        contrasted: float | None = None,
    ) -> None:
        self.store = store
        self.contrasted = contrasted
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
        sums = sharpness_sums(gradient, targets, self.contrasted)
        if self.store is None:
            log_sharpness(self.trainer, sums)
        else:
            self.store(sharpness_means(self.trainer.accelerator.gather(sums[None]).sum(0)))
