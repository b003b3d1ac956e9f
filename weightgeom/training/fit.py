"""Training by the trainers of TRL, with fp32 checkpoints at log-spaced steps; it goes on where it was cut."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from weightgeom.interfaces import Log, Objective
from weightgeom.interruption import Wanted, undisturbed
from weightgeom.models.loading import check_length
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
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
    wanted: Wanted = undisturbed,
) -> Trajectory:
    """Train `network`, which is mutated, and leave its checkpoints in `directory`.

    `start` is a checkpoint that already holds step 0; without one the random start is saved too.
    Every checkpoint is an ordinary transformers directory with its tokenizer, or an adapter of `start`;
    `matching.json` says what the training came to. An interrupted training is resumed by the same call,
    `network` being the start as before; what `directory` holds beyond the step that it resumes from is
    deleted. After each step it looks what is `wanted`: `save` a state to resume from, or `stop` with one.

    Raises:
        Interrupted: when it has stopped because that was wanted.
        FloatingPointError: when the loss or a weight is no longer finite; the good checkpoints stay.
        ValueError: if sequences of `max_length` do not fit the model, nothing is left to train on, the
            data lack what the match needs, the objective cannot be resumed, or an adapter has no start.
        RuntimeError: if the first loss is not what the objective knows it must be.
    """
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils.logging import disable_progress_bar

    from weightgeom.models.residual import architecture_of
    from weightgeom.training.callbacks import Checkpoints, GradientNorms
    from weightgeom.training.matching import Matching, Measure
    from weightgeom.training.resuming import States, discard, restored, resumable

    disable_progress_bar()  # the one of the run is enough
    training.check(examples)
    if training.lora.r is not None and start is None:
        raise ValueError("lora.r trains an adapter of a base, and a random start is none: leave lora.r out")
    check_length(training.max_length, getattr(network.config, "max_position_embeddings", None))
    saved = [step for step in training.save_steps() if step or start is None]
    state = resumable(directory, saved)
    discard(directory, state)
    architecture = architecture_of(network.config)
    arguments = training.arguments(directory, seed, device)
    if training.lora.r is not None:
        arguments["peft_config"] = training.lora.config(architecture)
    with outdated_name_allowed():
        trainer = objective.trainer(network, tokenizer, examples, arguments)
    moving = getattr(trainer.args, "sync_ref_model", False)
    if training.save_every is not None and moving:
        raise ValueError("save_every cannot restore a reference that moves (sync_ref_model): leave one out")
    measure = Measure(
        network,
        tokenizer,
        architecture,
        examples,
        start=directory / "step-0" if start is None else start,
        hold=training.match == "delta_norm",
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        Matching(training, measure, directory, log_metrics)
    )  # first: it may end the training
    trainer.add_callback(
        Checkpoints(
            directory,
            saved,
            tokenizer,
            log_metrics,
            objective.first_loss,
            keep_start=start is None and state is None,
        )
    )
    trainer.add_callback(
        States(trainer, directory, state, training.keep, undisturbed if moving else wanted)
    )  # behind the checkpoint of the same step
    if training.log_gradients:
        trainer.add_callback(GradientNorms(architecture.matrices, log_metrics))
    log.info("training %s for %d steps of %d examples", name, training.steps, training.batch_size)
    with outdated_name_allowed(), restored(network, state, architecture):
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
    discard(directory, None, only_states=True)
    return trajectory(directory, name, start)


@contextmanager
def outdated_name_allowed() -> Iterator[None]:
    """Within it there is no warning that TRL and PEFT ask transformers by a name on its way out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def trajectory(directory: Path, name: str, start: Path | None = None) -> Trajectory:
    """The trajectory whose checkpoints `directory` holds, behind `start` as its step 0."""
    steps = {int(path.name.removeprefix("step-")): path for path in directory.glob("step-*")}
    if start is not None:
        steps[0] = start
    return Trajectory(name, dict(sorted(steps.items())), from_random=start is None)
