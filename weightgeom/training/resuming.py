"""Sealed training states: saved between steps, checked, and restored bit for bit on the CPU."""

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
from weightgeom.interruption import Interrupted, Wanted
from weightgeom.models.adapters import is_adapter
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import open_params, opened

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )


log = logging.getLogger(__name__)


STATE, SEAL, SUMS = "checkpoint-", "sealed.json", "running_sums.json"


class States(TrainerCallback):
    """Keeps the newest states to resume from: those that the library writes, and one whenever it is wanted.

    Where a stop is wanted, it raises Interrupted once that state is sealed.
    """

    def __init__(self, trainer: Any, directory: Path, start: Path | None, keep: int, wanted: Wanted) -> None:
        self.trainer = trainer
        self.directory = directory
        self.start = start
        self.keep = keep
        self.wanted = wanted
        self.stop = False

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Go on with the sums of the state that is resumed from; the library has just set its own to 0."""
        if self.start is not None:
            set_running_sums(self.trainer, json.loads((self.start / SUMS).read_text()))

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Look what is wanted; the library logs this step before it saves the state."""
        wanted = self.wanted()
        if wanted is not None:
            control.should_save, self.stop = True, wanted == "stop"
        if control.should_training_stop:
            control.should_save = False  # there is nothing left to resume

    def on_save(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Seal the state that the library has written, then delete those that are too old."""
        written = self.directory / f"{STATE}{state.global_step}"
        (written / SUMS).write_text(json.dumps(running_sums(self.trainer)))
        seal(written)
        for old in states(self.directory)[self.keep :]:
            shutil.rmtree(old)
        if self.stop:
            raise Interrupted(f"stopped after step {state.global_step}, whose state is saved")


def states(directory: Path) -> list[Path]:
    """The states in `directory`, whole or not, the newest first."""
    return sorted(directory.glob(f"{STATE}*"), key=_step, reverse=True)


def seal(state: Path) -> None:
    """Write the state's files through to the disk, then SEAL with their sizes; mutates the directory."""
    _synchronize(state)
    sizes = {path.name: path.stat().st_size for path in sorted(state.iterdir())}
    temporary = state / f".{SEAL}.tmp"
    temporary.write_text(json.dumps(sizes))
    _synchronize(state)
    temporary.rename(state / SEAL)


def resumable(directory: Path, saved: Collection[int]) -> Path | None:
    """The newest whole state whose training has left all checkpoints at the steps `saved` until then."""
    for state in states(directory):
        flaw = _flaw(state)
        missing = [
            step for step in saved if step <= _step(state) and not (directory / f"step-{step}").is_dir()
        ]
        if not flaw and not missing:
            log.info("resuming from step %d", _step(state))
            return state
        log.warning(
            "%s is of no use: %s; trying an older one", state, flaw or f"step-{missing[0]} is missing"
        )
    return None


@contextmanager
def restored(network: "PreTrainedModel", state: Path | None, architecture: Architecture) -> Iterator[None]:
    """Give `network`, which is mutated, the weights of a state, in whose presence the rest can be resumed.

    The library leaves out the weights that have another name on disk (GPT-NeoX: the unembedding), and
    warns of it; within the context it does not. The library restores all of an adapter by itself.
    """
    if state is None or is_adapter(state):
        yield
        return
    weights = open_params(state, architecture)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(weights[name])
    with lacking_weights_allowed():
        yield


def discard(directory: Path, state: Path | None, only_states: bool = False) -> None:
    """Delete what a training left in `directory` beyond `state`: all of it, if that is None."""
    last = -1 if state is None else _step(state)
    patterns = [f"{STATE}*"] if only_states else [f"{STATE}*", "step-*", ".step-*.tmp"]
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        if path.name.startswith(".") or _step(path) > last:
            shutil.rmtree(path)


def _flaw(state: Path) -> str:
    """What is wrong with a state; empty if nothing is."""
    try:
        for name, size in json.loads((state / SEAL).read_text()).items():
            found = (state / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        step = json.loads((state / "trainer_state.json").read_text())["global_step"]
        for path in state.glob("*.safetensors"):
            opened(path)
    except FileNotFoundError as error:
        return f"it lacks {Path(str(error.filename)).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return "" if step == _step(state) else f"trainer_state.json is of step {step}"


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _synchronize(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
