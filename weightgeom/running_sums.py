"""The sums over steps that a trainer has not logged yet, kept beside a state to resume from.

The library keeps them in memory alone: a training that resumed between two log lines would log means
over the steps since then, and not over all that belong to the line.
"""

import json
from pathlib import Path
from typing import Any

import torch

FILE = "running_sums.json"


def save_running_sums(trainer: Any, state: Path) -> None:
    """Write the sums of loss and metrics of a TRL trainer into the directory `state`."""
    sums = {
        "loss": trainer._tr_loss.item(),  # fp32, which JSON's doubles hold exactly
        "logged": trainer._globalstep_last_logged,
        "metrics": trainer._metrics["train"],
        "tokens": trainer._total_train_tokens,
    }
    (state / FILE).write_text(json.dumps(sums))


def restore_running_sums(trainer: Any, state: Path) -> None:
    """Give a TRL trainer, which is mutated, the sums of a state, once its training has begun."""
    sums = json.loads((state / FILE).read_text())
    trainer._tr_loss += torch.tensor(sums["loss"]).to(trainer._tr_loss)
    trainer._globalstep_last_logged = sums["logged"]
    trainer._metrics["train"].update(sums["metrics"])
    trainer._total_train_tokens = sums["tokens"]
