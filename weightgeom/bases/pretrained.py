"""Existing checkpoints, on the hub or in a directory: one to train from, or two to compare."""

import hashlib
import logging
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.bases.hub import HOW_TO_PIN, MOVING_REVISIONS, checkpoint_directory, fetch, identity, is_path
from weightgeom.bases.outline import Outline
from weightgeom.bases.remote import hub_name, is_remote
from weightgeom.data.world import World
from weightgeom.declarations import ProbeDeclaration
from weightgeom.interfaces import Data, Intervention, Stage
from weightgeom.interruption import Request, no_request
from weightgeom.models.adapters import as_pair, is_adapter, open_adapter, open_checkpoint, warn_of_other_base
from weightgeom.models.byte_ranges import without_secrets
from weightgeom.models.gguf_files import convert_gguf, is_gguf
from weightgeom.models.language_model import trust
from weightgeom.models.loading import (
    check_length,
    check_tokenizer,
    load_architecture,
    load_config,
    load_context,
    load_tokenizer,
    warn_of_other_settings,
    warn_of_other_vocabulary,
)
from weightgeom.models.pickled import convert, is_pickled
from weightgeom.models.residual import Architecture
from weightgeom.models.vocabulary import aligned
from weightgeom.models.weights import check_finite, difference, open_params
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

log = logging.getLogger(__name__)
TrainedBy = Literal["dpo", "kto", "ipo", "orpo", "simpo", "rlhf", "ppo", "grpo", "sft", "ce", "pretraining"]


@dataclass(frozen=True)
class Pretrained:
    """One checkpoint or a trajectory: a directory, a GGUF file, a hub name, or a URL.

    The weights at a URL (`hf://NAME/MODEL`, `https://`, `s3://`, `gs://`) are read over the network and not
    kept, unless `cache` is true. `{size}` and `{stage}` in the name are filled in. `package` is an installed
    package that ships the file `name`.

    `revision` is a commit, or a tag or branch that does not move; the default is the name's commit in
    `pins`. An unpinned hub name is refused, because `main` may change. Weights are trained and measured in
    `dtype`; only float32 keeps a small update from being rounded away.

    Several `revisions`, in their order, or a directory with a trainer's `checkpoint-100`, `checkpoint-200`,
    ..., by number, form a trajectory: updates count from the first one on, and an objective starts from the
    last one. Revisions stand at the steps in their names if these rise and all else in the names is alike,
    and otherwise at 0, 1, 2, .... `from_random` marks the first one as a random initialisation; by default it
    is one if its name says step 0.

    `allow_bin` also accepts pickled weights, which are converted once; `trust_remote_code` allows the
    repository's own code to run.
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
    package: str | None = None
    cache: bool = False

    def __post_init__(self) -> None:
        """Refuse moving branches, and revisions that form no trajectory."""
        if moving := MOVING_REVISIONS & {self.revision, *self.pins.values(), *(self.revisions or ())}:
            how = HOW_TO_PIN.format(key="model.revision", name="NAME")
            raise ValueError(f"model.revision={moving.pop()} is a moving branch: {how}")
        if self.revisions is None:
            return
        if len(set(self.revisions)) < max(2, len(self.revisions)):
            raise ValueError(
                "model.revisions must be two or more different names, such as [step0,step512], got"
                f" {self.revisions}"
            )

    def check(self, longest: int | None) -> Architecture:
        """Fetch only the configs; raises if that fails."""
        locations = self.locations()
        directories = [
            fetch(location, weights=False, code=self.trust_remote_code, cache=self.cache)
            for location in locations.values()
        ]
        # A merged model may keep its adapter's config; before its weights are here, its own tells it apart.
        bare = (directory for directory in directories if not (directory / "config.json").is_file())
        if adapters := [directory for directory in bare if is_adapter(directory)]:
            raise ValueError(
                f"{adapters[-1]} is an adapter without weights of its own: compare it with its base,"
                f" {as_pair(adapters[-1])}"
            )
        architectures = [load_architecture(directory) for directory in directories]
        if any(other != architectures[-1] for other in architectures):
            raise ValueError(
                f"the checkpoints of {self.name} differ in architecture: set model.revisions to those of one"
                " network"
            )
        check_length(longest or 0, load_context(directories[-1]))
        check_tokenizer(directories[-1], only_if_there=True)
        for location, directory in zip(locations.values(), directories, strict=True):
            check_here(location, directory)
        return architectures[-1]

    def locations(self) -> dict[int, str]:
        """The locations to fetch, by step and in order; a single checkpoint stands at step 0.

        Raises:
            FileNotFoundError: if the package that ships the file is not installed.
            ValueError: if a hub name has no revision.
        """
        if self.package is not None:
            return {0: str(shipped_file(self.package, self.name))}
        name = self.name.replace("{size}", self.size).replace("{stage}", self.stage)
        path = Path(name).expanduser()
        if path.is_dir():
            inside = {directory: _step(directory.name) for directory in path.glob("checkpoint-*")}
            steps = {
                step[0]: str(directory)
                for directory, step in inside.items()
                if step is not None and directory.is_dir()
            }
            single = (path / "config.json").is_file() or len(steps) < 2
            return {0: name} if single else dict(sorted(steps.items()))
        if is_gguf(path):
            return {0: name}
        if is_remote(name) and not hub_name(name):
            if self.revisions:
                raise ValueError(
                    f"model.name={without_secrets(name)} is the URL of one checkpoint: leave out"
                    " model.revisions, or compare two by model=pair"
                )
            return {0: name}
        if "@" in hub_name(name):
            return {0: name}
        if self.revisions is None:
            revision = self.revision or self.pins.get(name)
            if revision is None and is_path(
                name.removeprefix("hf://")
            ):  # `fetch` raises if it does not exist
                return {0: name}
            if revision is None:
                pinned = f", or choose a pinned name from {', '.join(self.pins)}" if self.pins else ""
                how = HOW_TO_PIN.format(key="model.revision", name=hub_name(name) or name)
                raise ValueError(f"{name} is not pinned: {how}{pinned}")
            return {0: f"{name}@{revision}"}
        return {
            step: f"{name}@{revision}"
            for step, revision in zip(_steps(self.revisions), self.revisions, strict=True)
        }

    def outline(self, examples: Examples, data: Data) -> Outline:
        """The locations, and the config of the last one, which is all that this fetches."""
        last = max(self.locations())
        return outline_of(self.locations(), last, self.allow_bin, self.trust_remote_code, self.cache)

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, request: Request = no_request
    ) -> Base:
        """Fetch all checkpoints."""
        steps = {
            step: with_safetensors(
                fetch(location, self.allow_bin, self.trust_remote_code, cache=self.cache),
                self.allow_bin,
                stage,
            )
            for step, location in self.locations().items()
        }
        last = steps[max(steps)]
        for directory in dict.fromkeys((steps[min(steps)], last)):  # the others when they are measured
            architecture = load_architecture(directory)
            check_finite(open_params(directory, architecture), architecture, str(directory))
        check_tokenizer(last)
        warn_of_generated_text(data, last)
        if len(steps) == 1:
            return Base(last, identity(last))
        at_zero = self.revisions is None or (_step(self.revisions[0]) or (None,))[0] == 0
        random = 0 in steps and at_zero if self.from_random is None else self.from_random
        digest = hashlib.sha256(" ".join(map(identity, steps.values())).encode()).hexdigest()[:16]
        return Base(last, f"trajectory/{digest}", Trajectory("revisions", steps, from_random=random))


@dataclass(frozen=True)
class TwoCheckpoints:
    """A comparison of two checkpoints of one architecture: directories, GGUF files, hub names, or URLs.

    A hub name may have `@revision`. URLs and `cache` are as in `Pretrained`.
    `after` may be a LoRA adapter of `before`, as saved by PEFT, and may have more or fewer embedding rows:
    the shared ones are compared. A pair has no optimizer steps: `before` stands at step 0, `after` at step 1.
    Text is tokenized, and chats are rendered, by the tokenizer of the checkpoint that `tokenizer` names.
    `stage` names the training of `after` from `before`, such as dpo or sft: reports judge only pairs
    that say so.
    `allow_bin` and `trust_remote_code` are as in `Pretrained`.
    """

    before: str
    after: str
    stage: TrainedBy | None = None
    tokenizer: Literal["before", "after"] = "before"
    allow_bin: bool = False
    trust_remote_code: bool = False
    cache: bool = False

    def check(self, longest: int | None) -> Architecture:
        """Refuse an objective, checkpoints that differ in a name or shape, and another model's adapter."""
        if longest is not None:
            raise ValueError("model=pair compares two finished checkpoints: set objective=none")
        before, after = self._fetched()
        if is_adapter(before):
            raise ValueError(f"model.before={self.before} is an adapter: set model.before to its base model")
        architecture = load_architecture(before)
        if not (is_adapter(after) or after == before):
            load_architecture(after)
        check_tokenizer(after if self.tokenizer == "after" else before, only_if_there=True)
        pickled = is_pickled(before) or is_pickled(after)
        converted = (pickled and self.allow_bin) or is_gguf(before) or is_gguf(after)
        if not converted:  # else compared after their conversion
            self._compare(before, after, architecture)
        return architecture

    def locations(self) -> dict[int, str]:
        """The locations to fetch, by step."""
        return {0: self.before, 1: self.after}

    def outline(self, examples: Examples, data: Data) -> Outline:
        """The locations, and the config of `before`, which is all that this fetches."""
        return outline_of(self.locations(), 0, self.allow_bin, self.trust_remote_code, self.cache)

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, request: Request = no_request
    ) -> Base:
        """Fetch both checkpoints."""
        before, after = (with_safetensors(fetched, self.allow_bin, stage) for fetched in self._fetched())
        architecture = load_architecture(before)
        self._compare(before, after, architecture)
        start = open_params(before, architecture)
        check_finite(start, architecture, str(before))
        check_finite(open_checkpoint(after, architecture, start), architecture, str(after))
        warn_of_generated_text(data, before)
        return pair_base(before, after, after if self.tokenizer == "after" else before)

    def _fetched(self) -> tuple[Path, Path]:
        before, after = (
            fetch(location, self.allow_bin, self.trust_remote_code, cache=self.cache)
            for location in (self.before, self.after)
        )
        return before, after

    def _compare(self, before: Path, after: Path, architecture: Architecture) -> None:
        same = same_vocabulary(before, after, architecture)
        if is_adapter(after):
            warn_of_other_base(after, self.before)
        warn_of_other_settings(before, after)
        warn_of_other_vocabulary(before, after)
        if self.tokenizer == "after" and not same:
            raise ValueError(
                "model.tokenizer=after needs a whole model with the vocabulary of model.before, unlike"
                f" {after}: set model.tokenizer=before"
            )


def shipped_file(package: str, name: str) -> Path:
    """The file of that name in an installed distribution, found without importing it.

    Raises:
        FileNotFoundError: if the distribution is not installed, or has no such file.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is in the package {package}, which is not installed: pip install 'weightgeom[real]'"
        ) from error
    for file in files:
        if file.name == name and (path := Path(str(file.locate()))).is_file():
            return path
    raise FileNotFoundError(
        f"the installed package {package} holds no {name}: pip install --upgrade {package}"
    )


def check_single(probes: Mapping[str, ProbeDeclaration], interventions: Mapping[str, Intervention]) -> None:
    """Raise ValueError if a single checkpoint is given to a probe or an intervention that needs an update."""
    needing = [
        *(f"probe.{name}" for name, declaration in probes.items() if declaration.needs_update),
        *(
            f"intervention.{name}"
            for name, intervention in interventions.items()
            if intervention.declaration.needs_update
        ),
    ]
    if needing or not (probes or interventions):
        which = f" {needing[0]} is about it:" if needing else ""
        raise ValueError(
            f"objective=none on a single checkpoint leaves no update to measure:{which} choose an objective,"
            " model.revisions=[...], or model=pair model.before=... model.after=...; or what is about the"
            " checkpoint itself, such as probe=[spectrum,behaviour] intervention=[rank1]; to compare the"
            " stages of a chain, leave out model.from"
        )


def warn_of_generated_text(data: Data, directory: Path) -> None:
    """Log a warning if the data are the generated world and the tokenizer in `directory` is not its own."""
    if not isinstance(data, World):
        return
    try:
        vocabulary = load_tokenizer(directory).get_vocab()
    except (FileNotFoundError, ValueError):  # refused where the tokenizer is needed
        return
    if vocabulary != data.tokenizer().get_vocab():
        log.warning(
            "data=world is the generated language of model=tiny, not text of %s, so activations and losses on"
            " it say little: set data=text data.train=FILE, or data=preferences or data=hub",
            directory,
        )


def outline_of(
    locations: dict[int, str], step: int, allow_bin: bool, code: bool, cache: bool = False
) -> Outline:
    """The outline of checkpoints at `locations`, with the config of the one at `step`, the only fetch."""
    if is_remote(location := locations[step]):
        directory = fetch(location, allow_bin, code, weights=False, cache=cache)
    else:
        directory = checkpoint_directory(location, ["config.json", *(["*.py"] if code else [])])
    if code:
        trust(directory)
    try:
        tokenizer = load_tokenizer(directory)
    except (FileNotFoundError, ValueError):  # not downloaded yet
        tokenizer = None
    load_architecture(directory)  # refuses what a run would refuse
    return Outline(load_config(directory), locations, None, tokenizer, allow_bin, code, cache)


def pair_base(before: Path, after: Path, tokenizer: Path) -> Base:
    """The comparison of `after` with `before`, with text tokenized by the checkpoint in `tokenizer`."""
    digest = hashlib.sha256(f"{identity(before)} {identity(after)}".encode()).hexdigest()[:16]
    suffix = {before: "", after: ", after"}.get(tokenizer, f", {identity(tokenizer)}")
    return Base(tokenizer, f"pair/{digest}{suffix}", Trajectory("pair", {0: before, 1: after}))


def same_vocabulary(before: Path, after: Path, architecture: Architecture) -> bool:
    """Whether `after` is a whole model with the vocabulary of `before`; reads no weights.

    Raises:
        ValueError: if the two differ in a name, or in a shape other than the vocabulary size, or if `after`
            is an adapter of another model.
    """
    start = open_params(before, architecture)
    if is_adapter(after):
        open_adapter(after, architecture, start)
        return False
    other = open_params(after, load_architecture(after))
    shared = aligned(other, start, architecture, after)
    difference(shared, start)
    return shared is other


def with_safetensors(directory: Path, allow_bin: bool, stage: Stage) -> Path:
    """The checkpoint itself; of pickled weights or a GGUF file the conversion to safetensors, made once."""
    if is_gguf(directory):
        specification = {"checkpoint": identity(directory)}
        return stage("converted", specification, lambda target, log: convert_gguf(directory, target), 1)
    if not allow_bin or not is_pickled(directory):
        return directory
    specification = {"checkpoint": identity(directory)}
    return stage("converted", specification, lambda target, log: convert(directory, target), 1)


def check_here(location: str, directory: Path) -> None:
    """Refuse weights that cannot be read, by the headers of their files, if they are on this disk."""
    if Path(location).expanduser().is_dir() and any(directory.glob("*.safetensors")):
        open_params(directory, load_architecture(directory))


def _steps(revisions: list[str]) -> list[int]:
    """The step of each revision: that in its name, if steps rise and the names differ in nothing else."""
    steps_named = [_step(revision) for revision in revisions]
    steps = [step[0] for step in steps_named if step is not None]
    alike = len({step[1] for step in steps_named if step is not None}) == 1
    if len(steps) == len(steps_named) and alike and steps == sorted(set(steps)):
        return steps
    log.info("the steps 0, 1, 2, ... are the revisions %s, in this order", ", ".join(revisions))
    return list(range(len(revisions)))


def _step(name: str) -> tuple[int, str] | None:
    """The optimizer step in the name of a revision or a checkpoint, and the text before it.

    Names end in it, such as `checkpoint-100`, or in the tokens seen until then, such as
    `stage1-step1000-tokens3B`.
    """
    named = re.fullmatch(r"(.*?)(\d{1,15})(?:-tokens[\d.]+[KMBT])?", name)
    return None if named is None else (int(named[2]), named[1])
