"""Matched-budget training: stop at a target token count, update norm or accuracy."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from weightgeom.interfaces import Log
from weightgeom.models.experts import stacked
from weightgeom.models.language_model import LanguageModel, kept_buffers
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import open_params
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import responses
from weightgeom.training.config import Training
from weightgeom.training.lora import current_weights
from weightgeom.training.ranks import from_first, is_first, is_sharded, whole

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

log = logging.getLogger(__name__)
PAIRS, LENGTH = 96, 256  # number of pairs, and tokens: the defaults of the probe `behaviour`


class TrainingProgress:
    """The distance of the network in training from `start`, and its preference accuracy on held-out pairs.

    `hold` keeps the start's weights in memory for repeated measurements, which doubles the memory.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        architecture: Architecture,
        examples: Examples,
        start: Path,
        hold: bool,
        device: torch.device,
    ) -> None:
        self.network = network
        self.architecture = architecture
        self.start = start
        self.hold = hold
        self._held: Params | None = None
        model = LanguageModel(network, tokenizer, architecture, device)
        # A second network for the same weights: the trainer patches its own and keeps it in training mode.
        self.model = replace(model, network=model.with_weights({}))
        self.pairs = [
            (chosen.to(device), rejected.to(device))
            for chosen, rejected in responses(examples.heldout_pairs[:PAIRS], tokenizer, LENGTH)
        ]

    @torch.no_grad()
    def delta_norm(self) -> float:
        """‖θ − θ_start‖_F over all weights."""
        weights, device = current_weights(self.network, self.architecture), self.network.device
        start = self._held or stacked(open_params(self.start, self.architecture), self.architecture.stacks)
        if self.hold and self._held is None:
            start = self._held = {name: start[name].to(device, torch.float32) for name in weights}
        norms = [
            torch.linalg.vector_norm(whole(weight) - start[name].to(device, torch.float32))
            for name, weight in weights.items()
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms).double()))

    def accuracy(self) -> float | None:
        """Share of held-out pairs whose chosen response is the more likely one; None without pairs."""
        if not self.pairs:
            return None
        if is_sharded(self.network):  # which no process has the memory to hold a second time
            training = self.network.training
            margins = self._margins(replace(self.model, network=self.network.eval()), {})
            self.network.train(training)
        else:
            kept = kept_buffers(self.network)
            weights = {name: buffer for name, buffer in self.network.named_buffers() if name in kept}
            weights |= current_weights(self.network, self.architecture)
            margins = self._margins(self.model, weights)
        return float((torch.cat(margins) > 0).double().mean())

    def _margins(self, model: LanguageModel, weights: Params) -> list[torch.Tensor]:
        return [
            model.log_probs(weights, chosen).sum(1) - model.log_probs(weights, rejected).sum(1)
            for chosen, rejected in self.pairs
        ]


class MatchedBudget(TrainerCallback):
    """Ends the training when the matched quantity reaches its target, and reports all final quantities."""

    def __init__(
        self, training: Training, progress: TrainingProgress, directory: Path, log_metrics: Log
    ) -> None:
        self.training = training
        self.progress = progress
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
            value = self.progress.delta_norm()
        elif match == "accuracy" and state.global_step % self.training.match_every == 0:
            value = self.progress.accuracy()
        value = from_first(lambda: value)  # so that all processes stop at the same step
        if value is not None and target is not None and value >= target:
            control.should_training_stop = True

    def on_train_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Report the final steps, tokens, norm and accuracy: in the log, matching.json and metrics."""
        match, target = self.training.match, self.training.target
        steps, tokens = state.global_step, state.num_input_tokens_seen
        norm, accuracy = self.progress.delta_norm(), self.progress.accuracy()
        final = {"steps": steps, "tokens": tokens, "delta_norm": norm, "accuracy": accuracy}
        accuracy_text = "no held-out pairs" if accuracy is None else f"held-out accuracy {accuracy:.3f}"
        log.info(
            "stopped at step %d of %d: %d tokens, update norm %.4g, %s",
            *(steps, self.training.steps, tokens, norm, accuracy_text),
        )
        reached = match == "steps" or (final[match] or 0) >= (target or 0)
        if not reached:
            log.warning(
                "%s reached %.4g instead of its target %.4g within %d steps: raise training.steps",
                *(match, final[match], target, steps),
            )
        metrics = {"matched_tokens": float(tokens), "delta_norm": norm}
        metrics |= {} if accuracy is None else {"heldout_accuracy": accuracy}
        if match != "steps":  # three more keys; MLflow's pages slow down beyond about 50
            self.log_metrics(metrics, steps)
        report = {"match": match, "target": target, "reached": reached, **final}
        if is_first():
            (self.directory / "matching.json").write_text(json.dumps(report, indent=2) + "\n")
