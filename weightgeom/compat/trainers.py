"""Private state of the trainers of transformers and TRL."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def prepared(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A collated batch on the trainer's device: `Trainer._prepare_inputs` of transformers 5.

    There is no public way to have a batch as a training step has it.
    """
    return trainer._prepare_inputs(batch)


def add_metric(trainer: Any, name: str, value: float) -> None:
    """Average `value` into the trainer's next log line: `_metrics["train"]` of TRL 1; mutates the trainer.

    A callback's own `trainer.log` would make a second line for the same step.
    """
    trainer._metrics["train"][name].append(value)


def running_sums(trainer: Any) -> dict[str, Any]:
    """The sums since the last log line, and the tokens so far, as JSON.

    transformers 5 (`_tr_loss`, `_globalstep_last_logged`) and TRL 1 (`_metrics`, `_total_train_tokens`)
    leave them out of their saved states, so that the curves of a resumed training would differ.
    """
    return {
        "loss": trainer._tr_loss.item(),  # fp32, which JSON's doubles hold exactly
        "logged": trainer._globalstep_last_logged,
        "metrics": trainer._metrics["train"],
        "tokens": trainer._total_train_tokens,
    }


def set_running_sums(trainer: Any, of_all: Sequence[Mapping[str, Any]], process: int, number: int) -> None:
    """Give a trainer, which is mutated, its `running_sums`, once its training has begun.

    `of_all` are those of all processes; of another `number` of them, each one's loss is the mean.
    """
    losses = [sums["loss"] for sums in of_all]
    sums = of_all[process] if number == len(of_all) else {**of_all[0], "loss": sum(losses) / len(losses)}
    trainer._tr_loss += torch.tensor(sums["loss"]).to(trainer._tr_loss)
    trainer._globalstep_last_logged = sums["logged"]
    trainer._metrics["train"].update(sums["metrics"])
    trainer._total_train_tokens = sums["tokens"]


@contextmanager
def lacking_weights_allowed() -> Iterator[None]:
    """Within it transformers 5 does not warn of weights that a state has by another name, or not at all.

    The warning is known by its text, there being no argument to turn it off.
    """

    def other(record: logging.LogRecord) -> bool:
        return "keys in the checkpoint model loaded" not in record.getMessage()

    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def log_pairs(trainer: Any, outputs: Any, pairs: Mapping[str, Tensor]) -> None:
    """Log a batch of pairs by TRL's own loss: `DPOTrainer._compute_loss` of TRL 1; mutates its metrics.

    `outputs` are those of the fused head. With `precompute_ref_logps`, TRL takes the log-probabilities of
    the reference from `pairs`. There is no public way to have its metrics without its loss.
    """
    from trl import DPOTrainer

    with torch.no_grad():
        DPOTrainer._compute_loss(trainer, lambda **_: outputs, dict(pairs), False)
