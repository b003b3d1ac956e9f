"""How sharp an objective is: how many tokens, and how much of the target, are in its logit gradient."""

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

TOKENS = 256  # of a batch that are looked at


def participation_ratio(gradient: Float[Tensor, "token candidate"]) -> Float[Tensor, " token"]:
    """(Σ g_i²)² / Σ g_i⁴: 1 if the gradient is in one entry, their number if it is the same in all."""
    energy = (gradient / gradient.abs().amax(1, keepdim=True)).square()  # or g⁴ underflows
    return energy.sum(1).square() / energy.square().sum(1)


def target_energy(
    gradient: Float[Tensor, "token candidate"], target: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """g_target² / Σ g_i², the share of the target in the gradient's energy: 0 to 1."""
    energy = (gradient / gradient.abs().amax(1, keepdim=True)).square()
    return energy.gather(1, target[:, None])[:, 0] / energy.sum(1)


def log_prob_gradient(
    logits: Float[Tensor, "token vocabulary"],
    targets: Int[Tensor, " token"],
    coefficient: Float[Tensor, " token"],
) -> Float[Tensor, "token vocabulary"]:
    """The logit gradient of a loss with dL / d log p(target) = `coefficient`: c (onehot - p)."""
    gradient = -torch.softmax(logits, 1)
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    return coefficient[:, None] * gradient


def sharpness(
    logits: Float[Tensor, "token vocabulary"],
    targets: Int[Tensor, " token"],
    coefficient: Float[Tensor, " token"],
) -> dict[str, float]:
    """Mean participation ratio and target energy of a loss of log-probabilities, such as CE and DPO.

    `coefficient` is dL / d log p(target); a token without a gradient has no sharpness and does not
    count. Empty if there is no other.
    """
    sums = sharpness_sums(log_prob_gradient(logits, targets, coefficient), targets)
    return means(sums)


def sharpness_sums(
    gradient: Float[Tensor, "token candidate"], target: Int[Tensor, " token"]
) -> Float[Tensor, "3"]:
    """Sums of the participation ratio and the target energy, and the number of tokens with a gradient."""
    some = gradient.ne(0).any(1)
    gradient, target = gradient[some], target[some]
    found = (participation_ratio(gradient), target_energy(gradient, target), some[some].to(gradient))
    return torch.stack([one.sum() for one in found])


def means(sums: Float[Tensor, "3"]) -> dict[str, float]:
    """The means by the names that they are logged under; empty without a token."""
    ratio, energy, count = sums.tolist()
    return {"participation_ratio": ratio / count, "target_energy": energy / count} if count else {}


def spread(count: int) -> list[int]:
    """At most `TOKENS` indices of `count` tokens, evenly spread."""
    return [index * count // TOKENS for index in range(TOKENS)] if count > TOKENS else list(range(count))


def due(args: "TrainingArguments", state: "TrainerState", step: int) -> bool:
    """Whether the trainer logs at this step."""
    return step % max(1, state.logging_steps) == 0 or (step == 1 and args.logging_first_step)


def log_sharpness(trainer: Any, sums: Float[Tensor, "3"]) -> None:
    """Add the means over all processes to what a TRL trainer logs next; mutates its metrics."""
    for name, value in means(trainer.accelerator.gather(sums[None]).sum(0)).items():
        add_metric(trainer, name, value)


class Sharpness(TrainerCallback):
    """Logs the sharpness of the first training examples, for a TRL trainer on log-probabilities.

    They are the same at every step, so that the curve shows the training and not the batches. It draws
    no random number: a training goes exactly as without it.
    """

    def __init__(
        self, trainer: Any, scored: Callable[[Mapping[str, Tensor]], Scored], examples: int = 4
    ) -> None:
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
        """Measure, if this step is logged."""
        if not due(args, state, state.global_step):
            return
        model, data = kwargs["model"], self.trainer.train_dataset
        batch = self.trainer.data_collator([data[i] for i in range(min(self.examples, len(data)))])
        inputs = prepared(self.trainer, batch)
        mask = self.scored(inputs).targets[:, 1:]
        training = model.training
        model.eval()  # without dropout, whose noise would come from the training's generator
        with torch.no_grad():
            found = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )
        model.train(training)
        targets = inputs["input_ids"][:, 1:][mask]
        some = spread(len(targets))
        logits, targets = found.logits[:, :-1][mask][some], targets[some]
        gradient = log_prob_gradient(logits, targets, torch.ones_like(logits[:, 0]))
        log_sharpness(self.trainer, sharpness_sums(gradient, targets))
