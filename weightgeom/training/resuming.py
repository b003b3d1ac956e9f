"""Resumable states of a training: sealed when complete, validated, and restored bit for bit on the CPU."""

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from weightgeom.compat.trainers import lacking_weights_allowed, running_sums, set_running_sums
from weightgeom.interruption import Interrupted, Request
from weightgeom.models.adapters import is_adapter
from weightgeom.models.experts import stacked
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import open_params, opened
from weightgeom.text.files import sha256
from weightgeom.training.ranks import from_first, of_all, processes

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )


log = logging.getLogger(__name__)


STATE_PREFIX, SEAL, SUMS = "checkpoint-", "sealed.json", "running_sums.json"


class ResumeStates(TrainerCallback):
    """Seals and keeps the newest resumable states, both scheduled and requested ones.

    On a request to stop, raises Interrupted once the state is sealed.
    """

    def __init__(
        self, trainer: Any, directory: Path, start: Path | None, keep: int, request: Request
    ) -> None:
        self.trainer = trainer
        self.directory = directory
        self.start = start
        self.keep = keep
        self.request = request
        self.stop = False

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Restore the running sums of the state resumed from; the trainer has just reset its own to 0."""
        if self.start is not None:
            sums = json.loads((self.start / SUMS).read_text())
            set_running_sums(self.trainer, sums, self.trainer.args.process_index, processes())

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Poll the request; the trainer logs this step before it saves the state."""
        request = from_first(self.request)
        if request is not None:
            control.should_save, self.stop = True, request == "stop"
        if control.should_training_stop:
            control.should_save = False  # a complete training needs no state

    def on_save(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Seal the state that the trainer has written, then delete the oldest states."""
        sums = of_all(running_sums(self.trainer))  # also waits until all processes have written their part
        from_first(lambda: self._seal(state.global_step, sums))
        if self.stop:
            raise Interrupted(f"stopped after step {state.global_step}; its state is saved")

    def _seal(self, step: int, sums: list[dict[str, Any]]) -> None:
        written = self.directory / f"{STATE_PREFIX}{step}"
        (written / SUMS).write_text(json.dumps(sums))
        seal(written)
        for old in resume_states(self.directory)[self.keep :]:
            shutil.rmtree(old)


def resume_states(directory: Path) -> list[Path]:
    """The states in `directory`, complete or not, newest first."""
    return sorted(directory.glob(f"{STATE_PREFIX}*"), key=_step_in_name, reverse=True)


def seal(state: Path) -> None:
    """Flush the state's files to disk, then write SEAL; mutates the directory.

    SEAL lists size and SHA-256 of every file of the state, and of the checkpoints saved before it, which the
    training that resumes from it keeps.
    """
    flush_to_disk(state)
    files = [path for place in (state, *state.parent.glob("step-*")) for path in place.rglob("*")]
    sealed = {
        os.path.relpath(path, state): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(files)
        if path.is_file()
    }
    temporary = state / f".{SEAL}.tmp"
    temporary.write_text(json.dumps(sealed))
    flush_to_disk(state)
    temporary.rename(state / SEAL)
    flush_to_disk(state)


def is_sharded_state(state: Path) -> bool:
    """Whether the weights of a state are in the parts of several processes, as FSDP writes them."""
    return (state / "pytorch_model_fsdp_0").is_dir()


def check_shards(state: Path | None, shard: bool, number: int) -> None:
    """Raise ValueError if a training on `number` processes cannot resume from a state.

    One in parts of weights needs as many processes again; copies resume on any number.
    """
    if state is None:
        return
    again = f"to resume from it, or delete {state.parent} to start again"
    if is_sharded_state(state) != shard:
        saved = f"training.shard={str(not shard).lower()}"
        raise ValueError(f"{state} was saved with {saved}: set {saved} {again}")
    if shard and (parts := len(json.loads((state / SUMS).read_text()))) != number:
        raise ValueError(
            f"{state} is in the parts of {parts} processes: set training.processes={parts} {again}"
        )


def resumable(directory: Path, saved: Collection[int]) -> Path | None:
    """The newest valid state whose training has all its checkpoints (steps `saved`) up to that step."""
    for state in resume_states(directory):
        missing = [
            step
            for step in saved
            if step <= _step_in_name(state) and not (directory / f"step-{step}").is_dir()
        ]
        flaw = f"step-{missing[0]} is missing" if missing else _flaw(state)
        if not flaw:
            log.info("resuming from step %d", _step_in_name(state))
            return state
        log.warning("cannot resume from %s: %s; trying an older state", state, flaw)
    return None


@contextmanager
def restored_weights(
    network: "PreTrainedModel", state: Path | None, architecture: Architecture
) -> Iterator[None]:
    """Context with the weights of a state in `network`, which is mutated, before the trainer resumes.

    The trainer skips weights with a different name on disk (GPT-NeoX's unembedding) and warns about them;
    the context suppresses that warning. An adapter and sharded weights are restored by the trainer itself.
    """
    if state is None or is_adapter(state) or is_sharded_state(state):
        yield
        return
    weights = stacked(open_params(state, architecture), architecture.stacks)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(weights[name])
    with lacking_weights_allowed():
        yield


def delete_after(directory: Path, state: Path | None, only_states: bool = False) -> None:
    """Delete the checkpoints and states in `directory` later than `state`, or all of them if it is None."""
    last = -1 if state is None else _step_in_name(state)
    patterns = [f"{STATE_PREFIX}*"] if only_states else [f"{STATE_PREFIX}*", "step-*", ".step-*.tmp"]
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        if path.name.startswith(".") or _step_in_name(path) > last:
            shutil.rmtree(path)


def _flaw(state: Path) -> str:
    """The defect of a state; empty if it is valid."""
    try:
        for name, expected in json.loads((state / SEAL).read_bytes()).items():
            size = (state / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if sha256(state / name) != expected["sha256"]:
                return f"{name} is not the file that was written"
        step = json.loads((state / "trainer_state.json").read_text())["global_step"]
        for path in state.glob("*.safetensors"):
            opened(path)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return str(error)
    return "" if step == _step_in_name(state) else f"trainer_state.json records step {step}"


def _step_in_name(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def flush_to_disk(directory: Path) -> None:
    """Flush the files in `directory`, and the directory, from the operating system's cache to disk."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
