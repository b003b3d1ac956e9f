"""Existing checkpoints: on the hub, in its cache or in a directory; one to train from, or two to compare."""

import hashlib
import logging
import re
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.bases.hub import MOVING, PIN, _found, fetch, identity, is_path
from weightgeom.bases.outline import Outline
from weightgeom.interfaces import Data, Stage
from weightgeom.interruption import Wanted, undisturbed
from weightgeom.models.adapters import is_adapter, open_adapter
from weightgeom.models.language_model import trust
from weightgeom.models.loading import (
    check_length,
    load_architecture,
    load_config,
    load_context,
    load_tokenizer,
)
from weightgeom.models.pickled import convert, is_pickled
from weightgeom.models.residual import Architecture
from weightgeom.models.vocabulary import aligned
from weightgeom.models.weights import difference, open_params
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """One checkpoint, or a trajectory of them: a hub name, `{size}` and `{stage}` filled in, or a directory.

    `revision` is a commit, or a tag or branch that does not move; without it, that of `pins`, which has
    the commits of hub names. A name of the hub without either is refused, as `main` is another model
    some day. Several `revisions`, or a directory in which a
    trainer left `checkpoint-100`, `checkpoint-200`, ..., make a trajectory in the order of the numbers
    in their names; its last one is what an objective starts from. `from_random` says that its first is
    a random initialisation; by default that is so of a `step0`. Weights are trained and measured in
    `dtype`; only float32 keeps a small update from being rounded away.

    `allow_bin` also takes pickled weights, which are converted once; `trust_remote_code` lets code that
    lies in the repository run.
    """

    name: str
    revision: str | None = None
    size: str = ""
    stage: str = ""
    pins: dict[str, str] = Field(default_factory=dict)
    dtype: Literal["float32"] = "float32"
    revisions: list[str] | None = None
    from_random: bool | None = None
    allow_bin: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse revisions that make no trajectory, and those that move."""
        if moving := MOVING & {self.revision, *self.pins.values()}:
            raise ValueError(
                f"model.revision={moving.pop()} moves: {PIN.format(key='model.revision', name='NAME')}"
            )
        if self.revisions is None:
            return
        steps = [_step(revision) for revision in self.revisions]
        if None in steps or len(set(steps)) < max(2, len(steps)):
            raise ValueError(
                f"model.revisions must be two or more names with different numbers at their end, such as"
                f" step512, got {self.revisions}"
            )

    def check(self, longest: int | None) -> Architecture:
        """Fetch the configs alone; raises if they cannot be had, or nothing could be measured or trained."""
        locations = self.locations()
        if longest is None and len(locations) == 1:
            raise ValueError(
                "objective=none on a single checkpoint leaves no update to measure: choose an objective,"
                " model.revisions=[...], or model=pair model.before=... model.after=..."
            )
        found = [
            fetch(location, weights=False, code=self.trust_remote_code) for location in locations.values()
        ]
        architectures = [load_architecture(directory) for directory in found]
        if any(other != architectures[-1] for other in architectures):
            raise ValueError(f"the checkpoints of {self.name} are not all of one architecture")
        check_length(longest or 0, load_context(found[-1]))
        return architectures[-1]

    def locations(self) -> dict[int, str]:
        """What to fetch, by step and in order; a single checkpoint stands at step 0.

        Raises:
            ValueError: if a name of the hub has no revision.
        """
        name = self.name.format(size=self.size, stage=self.stage)
        path = Path(name).expanduser()
        if path.is_dir():
            inside = {_step(one.name): str(one) for one in path.glob("checkpoint-*") if one.is_dir()}
            steps = {step: one for step, one in inside.items() if step is not None}
            whole = (path / "config.json").is_file() or len(steps) < 2
            return {0: name} if whole else dict(sorted(steps.items()))
        if self.revisions is None:
            revision = self.revision or self.pins.get(name)
            if revision is None and is_path(name):  # fetch says that there is no such directory
                return {0: name}
            if revision is None:
                pinned = f"; pinned here are {', '.join(self.pins)}" if self.pins else ""
                how = PIN.format(key="model.revision", name=name)
                raise ValueError(f"{name} is not pinned: {how}{pinned}")
            return {0: f"{name}@{revision}"}
        steps = {_step(revision): f"{name}@{revision}" for revision in self.revisions}
        return dict(sorted((step, one) for step, one in steps.items() if step is not None))

    def outline(self, examples: Examples, data: Data) -> Outline:
        """What is fetched, and the config of the last of it; fetches that config alone."""
        return outlined(self.locations(), max(self.locations()), self.allow_bin, self.trust_remote_code)

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, wanted: Wanted = undisturbed
    ) -> Base:
        """Fetch it, or all of them."""
        steps = {
            step: converted(fetch(location, self.allow_bin, self.trust_remote_code), self.allow_bin, stage)
            for step, location in self.locations().items()
        }
        last = steps[max(steps)]
        if len(steps) == 1:
            return Base(last, identity(last))
        random = 0 in steps if self.from_random is None else self.from_random
        every = hashlib.sha256(" ".join(map(identity, steps.values())).encode()).hexdigest()[:16]
        return Base(last, f"trajectory/{every}", Trajectory("revisions", steps, from_random=random))


@dataclass(frozen=True)
class TwoCheckpoints:
    """Two checkpoints of one architecture, directories or hub names with `@revision`, to be compared.

    `after` may be a LoRA adapter of `before`, as PEFT saves it, and may have more or fewer rows of
    embeddings: the shared ones are compared. A pair has no optimizer steps: `before` stands at step 0 and
    `after` at step 1. Text is tokenized, and chats are written, as the one named by `tokenizer` does it.
    `allow_bin` and `trust_remote_code` as `Pretrained` has them.
    """

    before: str
    after: str
    tokenizer: Literal["before", "after"] = "before"
    allow_bin: bool = False
    trust_remote_code: bool = False

    def check(self, longest: int | None) -> Architecture:
        """Refuse an objective, two checkpoints that differ in a name or shape, and a foreign adapter."""
        if longest is not None:
            raise ValueError("model=pair compares two finished checkpoints: add objective=none")
        before, after = self._fetched()
        if is_adapter(before):
            raise ValueError(f"model.before={self.before} is an adapter: give its base model there instead")
        architecture = load_architecture(before)
        if not self.allow_bin:  # else they are compared when they are converted
            self._compare(before, after, architecture)
        return architecture

    def locations(self) -> dict[int, str]:
        """What to fetch, by step."""
        return {0: self.before, 1: self.after}

    def outline(self, examples: Examples, data: Data) -> Outline:
        """What is fetched, and the config of `before`; fetches that config alone."""
        return outlined(self.locations(), 0, self.allow_bin, self.trust_remote_code)

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, wanted: Wanted = undisturbed
    ) -> Base:
        """Fetch both."""
        before, after = (converted(one, self.allow_bin, stage) for one in self._fetched())
        self._compare(before, after, load_architecture(before))
        return pair(before, after, after if self.tokenizer == "after" else before)

    def _fetched(self) -> tuple[Path, Path]:
        before, after = (
            fetch(location, self.allow_bin, self.trust_remote_code) for location in (self.before, self.after)
        )
        return before, after

    def _compare(self, before: Path, after: Path, architecture: Architecture) -> None:
        same = one_network(before, after, architecture)
        if self.tokenizer == "after" and not same:
            raise ValueError(
                f"model.tokenizer=after needs a whole model with the vocabulary of model.before, and {after}"
                " is none"
            )


def outlined(locations: dict[int, str], step: int, allow_bin: bool, code: bool) -> Outline:
    """What is fetched of checkpoints by step, and the config of one of them; fetches that config alone."""
    directory = _found(locations[step], ["config.json", *(["*.py"] if code else [])])
    if code:
        trust(directory)
    try:
        tokenizer = load_tokenizer(directory)
    except (FileNotFoundError, ValueError):  # on the hub still
        tokenizer = None
    return Outline(load_config(directory), locations, None, tokenizer, allow_bin, code)


def pair(before: Path, after: Path, speaker: Path) -> Base:
    """`after` compared with `before`, text being tokenized as the checkpoint in `speaker` does it."""
    both = hashlib.sha256(f"{identity(before)} {identity(after)}".encode()).hexdigest()[:16]
    by = {before: "", after: ", after"}.get(speaker, f", {identity(speaker)}")
    return Base(speaker, f"pair/{both}{by}", Trajectory("pair", {0: before, 1: after}))


def one_network(before: Path, after: Path, architecture: Architecture) -> bool:
    """Whether `after` is a whole model with the vocabulary of `before`; reads no weights.

    Raises:
        ValueError: if the two differ in a name or a shape but that of the vocabulary, or `after` is an
            adapter of another model.
    """
    start = open_params(before, architecture)
    if is_adapter(after):
        open_adapter(after, architecture, start)
        return False
    other = open_params(after, load_architecture(after))
    shared = aligned(other, start, architecture, after)
    difference(shared, start)
    return shared is other


def converted(directory: Path, allow_bin: bool, stage: Stage) -> Path:
    """A checkpoint with safetensors: itself, or made once of its pickled weights."""
    if not allow_bin or not is_pickled(directory):
        return directory
    specification = {"checkpoint": identity(directory)}
    return stage("converted", specification, lambda target, log: convert(directory, target), 1)


def _step(name: str) -> int | None:
    """The number at the end of a revision's or checkpoint's name."""
    digits = re.search(r"(\d+)$", name)
    return None if digits is None else int(digits[1])
