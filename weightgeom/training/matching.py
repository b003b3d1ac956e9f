"""Trainings at equal footing: a stop at a number of tokens, a size of update or an accuracy, not of steps."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from weightgeom.interfaces import Log
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import open_params
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import responses
from weightgeom.training.config import Training
from weightgeom.training.lora import current_weights

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

log = logging.getLogger(__name__)
PAIRS, LENGTH = 96, 256  # pairs, tokens: as many as the probe `behaviour` takes by default


class Measure:
    """How far the network in training has come from `start`, and what it prefers on held-out pairs.

    With `hold` the start stays beside the network, for many measurements, and takes as much room.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        architecture: Architecture,
        examples: Examples,
        start: Path,
        hold: bool,
    ) -> None:
        self.network = network
        self.architecture = architecture
        self.start = start
        self.hold = hold
        self._held: Params | None = None
        model = LanguageModel(network, tokenizer, architecture, network.device)
        # Another network for the same weights: the trainer patches its own, and has it in training mode.
        self.model = replace(model, network=model.with_weights({}))
        self.pairs = [
            (chosen.to(network.device), rejected.to(network.device))
            for chosen, rejected in responses(examples.heldout_pairs[:PAIRS], tokenizer, LENGTH)
        ]

    @torch.no_grad()
    def delta_norm(self) -> float:
        """‖θ − θ_start‖_F over all weights."""
        weights, device = current_weights(self.network, self.architecture), self.network.device
        start = self._held or open_params(self.start, self.architecture)
        if self.hold and self._held is None:
            start = self._held = {name: start[name].to(device, torch.float32) for name in weights}
        norms = [
            torch.linalg.vector_norm(weight - start[name].to(device, torch.float32))
            for name, weight in weights.items()
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms).double()))

    def accuracy(self) -> float | None:
        """Share of held-out pairs whose chosen response is the likelier one; None without pairs."""
        if not self.pairs:
            return None
        weights = dict(current_weights(self.network, self.architecture))
        margins = [
            self.model.log_probs(weights, chosen).sum(1) - self.model.log_probs(weights, rejected).sum(1)
            for chosen, rejected in self.pairs
        ]
        return float((torch.cat(margins) > 0).double().mean())


class Matching(TrainerCallback):
    """Ends the training when what is matched reaches its target, and reports what everything came to."""

    def __init__(self, training: Training, measure: Measure, directory: Path, log_metrics: Log) -> None:
        self.training = training
        self.measure = measure
        self.directory = directory
        self.log_metrics = log_metrics

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Set `control.should_training_stop` when the target is reached."""
        match, target = self.training.match, self.training.target
        value: float | None = None
        if match == "tokens":
            value = state.num_input_tokens_seen
        elif match == "delta_norm":
            value = self.measure.delta_norm()
        elif match == "accuracy" and state.global_step % self.training.match_every == 0:
            value = self.measure.accuracy()
        if value is not None and target is not None and value >= target:
            control.should_training_stop = True

    def on_train_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Tell what steps, tokens, norm and accuracy came to: in the log, matching.json and metrics."""
        match, target = self.training.match, self.training.target
        steps, tokens = state.global_step, state.num_input_tokens_seen
        norm, accuracy = self.measure.delta_norm(), self.measure.accuracy()
        came_to = {"steps": steps, "tokens": tokens, "delta_norm": norm, "accuracy": accuracy}
        shown = "no held-out pairs" if accuracy is None else f"held-out accuracy {accuracy:.3f}"
        log.info(
            "stopped at step %d of %d: %d tokens, update of norm %.4g, %s",
            *(steps, self.training.steps, tokens, norm, shown),
        )
        reached = match == "steps" or (came_to[match] or 0) >= (target or 0)
        if not reached:
            log.warning(
                "%s came to %.4g, not to its target %.4g, within %d steps: raise training.steps",
                *(match, came_to[match], target, steps),
            )
        metrics = {"matched_tokens": float(tokens), "delta_norm": norm}
        metrics |= {} if accuracy is None else {"heldout_accuracy": accuracy}
        if match != "steps":  # three keys of MLflow's pages, which slow down past some 50
            self.log_metrics(metrics, steps)
        report = {"match": match, "target": target, "reached": reached, **came_to}
        (self.directory / "matching.json").write_text(json.dumps(report, indent=2) + "\n")
