"""Training by TRL's trainers, with fp32 checkpoints at log-spaced steps, resumable after an interruption."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from weightgeom.compat.fused_head import router_weight
from weightgeom.compat.sharding import shard_on_processors
from weightgeom.interfaces import Log, Objective, OnPolicy
from weightgeom.interruption import Request, no_request
from weightgeom.models.loading import check_length
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.ranks import from_first, processes
from weightgeom.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


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
    request: Request = no_request,
) -> Trajectory:
    """Train `network`, which is mutated, and save its checkpoints in `directory`.

    `start` is the checkpoint of step 0; without one, the randomly initialised network is saved as step 0.
    Every checkpoint is a standard transformers directory with its tokenizer, or an adapter of `start`;
    `matching.json` records the steps, tokens, update norm and accuracy reached. The same call, with
    `network` again at its start, resumes an interrupted training and deletes everything in `directory` from
    after the step that it resumes from. After each step `request` may ask to `save` a resumable state, or to
    save one and `stop`.

    Each process of a training on several calls this function with the same arguments; the first one writes.

    Raises:
        Interrupted: after a requested stop.
        FloatingPointError: if the loss or a weight is no longer finite; earlier checkpoints are kept.
        ValueError: if sequences of `max_length` do not fit the model, no training example is left, the data
            lack the examples that `match` needs, `match` counts tokens that the policy samples, the objective
            cannot be resumed, an adapter has no start, or the newest state was saved with another `shard`, or
            in the parts of another number of processes.
        RuntimeError: if the first loss differs from the objective's known first loss.
    """
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils.logging import disable_progress_bar

    from weightgeom.models.residual import architecture_of
    from weightgeom.training.callbacks import CheckpointWriter, GradientNorms
    from weightgeom.training.matching import MatchedBudget, TrainingProgress
    from weightgeom.training.optimizers import set_optimizer
    from weightgeom.training.resuming import (
        ResumeStates,
        check_shards,
        delete_after,
        restored_weights,
        resumable,
    )

    disable_progress_bar()  # the run shows its own
    training.check(examples)
    if training.lora.r is not None and start is None:
        raise ValueError(
            "lora.r trains an adapter of a base, but this training has a random start: unset lora.r"
        )
    if training.match == "tokens" and isinstance(objective, OnPolicy) and objective.on_policy:
        raise ValueError(
            "match=tokens counts the tokens of the data, and this objective trains on tokens that the policy"
            " samples: set training.match=delta_norm or steps"
        )
    check_length(training.max_length, getattr(network.config, "max_position_embeddings", None))
    saved = [step for step in training.save_steps() if step or start is None]
    state = from_first(lambda: resumable(directory, saved))
    check_shards(state, training.shard, processes())
    from_first(lambda: delete_after(directory, state))
    architecture = architecture_of(network.config)
    arguments = training.arguments(directory, seed, device)
    if training.lora.r is not None:
        arguments["peft_config"] = training.lora.config(architecture)
    with outdated_name_allowed():
        trainer = objective.trainer(network, tokenizer, examples, arguments)
    if training.shard and device == "cpu":
        shard_on_processors(trainer)
    set_optimizer(trainer, training.optimizer, training.learning_rate, architecture)
    moving = getattr(trainer.args, "sync_ref_model", False)
    if training.save_every is not None and moving:
        raise ValueError(
            "training.save_every cannot restore a reference that moves (sync_ref_model): set only one"
        )
    progress = TrainingProgress(
        network,
        tokenizer,
        architecture,
        examples,
        start=directory / "step-0" if start is None else start,
        hold=training.match == "delta_norm" and not training.shard,
        device=trainer.args.device,
    )
    trainer.remove_callback(PrinterCallback)
    # First, because it may end the training.
    trainer.add_callback(MatchedBudget(training, progress, directory, log_metrics))
    trainer.add_callback(
        CheckpointWriter(
            directory,
            saved,
            tokenizer,
            log_metrics,
            objective.first_loss,
            router_weight(trainer),
            keep_start=start is None and state is None,
        )
    )
    # After the checkpoint of the same step.
    trainer.add_callback(
        ResumeStates(trainer, directory, state, training.keep, no_request if moving else request)
    )
    if training.log_gradients:
        trainer.add_callback(GradientNorms(architecture, log_metrics))
    if processes() > 1:
        _warn_of_a_remainder(len(trainer.train_dataset), training)  # pyright: ignore[reportArgumentType]
    log.info("training %s for %d steps of %d examples", name, training.steps, training.batch_size)
    with outdated_name_allowed(), restored_weights(network, state, architecture):
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
    from_first(lambda: delete_after(directory, None, only_states=True))
    return saved_trajectory(directory, name, start)


def _warn_of_a_remainder(examples: int, training: Training) -> None:
    """Log a warning where several processes train on other batches than one, whose last one is shorter."""
    rest = examples % training.batch_size
    if rest and training.steps * training.accumulate > examples // training.batch_size:
        log.warning(
            "%d examples are no multiple of batch_size=%d: several processes fill up the last batch of an"
            " epoch, which has %d examples on one process, with the epoch's first examples",
            *(examples, training.batch_size, rest),
        )


@contextmanager
def outdated_name_allowed() -> Iterator[None]:
    """Context without transformers' warning about a deprecated name that TRL and PEFT still use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def saved_trajectory(directory: Path, name: str, start: Path | None = None) -> Trajectory:
    """The trajectory of the checkpoints in `directory`, with `start` as its step 0."""
    steps = {int(path.name.removeprefix("step-")): path for path in directory.glob("step-*")}
    if start is not None:
        steps[0] = start
    return Trajectory(name, dict(sorted(steps.items())), from_random=start is None)
