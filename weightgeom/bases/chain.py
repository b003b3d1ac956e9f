"""Comparison of finished training stages, such as pretraining, SFT and DPO."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.bases.hub import HOW_TO_PIN, MOVING_REVISIONS, fetch, identity, is_path
from weightgeom.bases.outline import Outline
from weightgeom.bases.pretrained import (
    check_here,
    outline_of,
    pair_base,
    same_vocabulary,
    warn_of_generated_text,
    with_safetensors,
)
from weightgeom.bases.remote import hub_name, is_remote
from weightgeom.declarations import ProbeDeclaration
from weightgeom.interfaces import Data, Log, Stage
from weightgeom.interruption import Request, no_request
from weightgeom.models.adapters import is_adapter, warn_of_other_base
from weightgeom.models.gguf_files import is_gguf
from weightgeom.models.loading import (
    check_length,
    check_tokenizer,
    load_architecture,
    load_context,
    warn_of_other_settings,
    warn_of_other_vocabulary,
)
from weightgeom.models.merging import merge
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import check_finite, open_params
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True, config={"coerce_numbers_to_str": True})  # a stage may be named 10
class Chain:
    """Two or more stages of one network, by name and in order; the first is the start of all others.

    A stage is a directory, a GGUF file, a URL, or a hub name (with `{size}` filled in, also as `hf://NAME`)
    with `@revision` or with its commit in `revisions`; an unpinned name is refused, because `main` may
    change. It may be a LoRA adapter of the stage before it, into which it is merged for all later
    comparisons. Every stage is compared with the first stage and, unless `neighbours` is false, with the one
    before it, in the subspaces of the earlier stage. The stages stand at steps 0, 1, 2, ... Text is
    tokenized, and chats are rendered, by the tokenizer of the stage named in `tokenizer`; by default by that
    of the earlier stage of each comparison. Stages may differ in dtype and in their number of embeddings, of
    which the shared ones are compared. `allow_bin`, `trust_remote_code` and `cache` are as in `Pretrained`.

    With `from_` nothing is compared: the chain stands for that one stage, as a checkpoint that an objective
    starts from and interventions edit. Of the others, only the base of an adapter is fetched.
    """

    stages: dict[str, str]
    revisions: dict[str, str | None] = Field(default_factory=dict)
    size: str = ""
    tokenizer: str | None = None
    neighbours: bool = True  # false: every stage is compared with the first alone
    from_: str | None = None  # `from` is a word of Python: in a configuration the key is model.from
    allow_bin: bool = False
    trust_remote_code: bool = False
    cache: bool = False

    def __post_init__(self) -> None:
        """Refuse fewer than two stages, malformed, ambiguous or unknown names, and a tokenizer of two."""
        names = list(self.stages)
        if len(names) < 2:
            raise ValueError(
                "model.stages must name two or more stages, such as {base: A, sft: B, dpo: C}, got"
                f" {names or 'none'}"
            )
        if bad := [name for name in names if not NAME.fullmatch(name)]:
            raise ValueError(
                f"model.stages has the invalid name {bad[0]!r}: use letters, digits and any of _.+-, starting"
                " with a letter or digit"
            )
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(
                f"model.stages has names that differ only in case, {', '.join(names)}: rename one of them"
            )
        for key, name in (("tokenizer", self.tokenizer), ("from", self.from_)):
            if name is not None and name not in self.stages:
                raise ValueError(f"unknown stage model.{key}={name}; choose from {', '.join(names)}")
        if self.from_ is not None and self.tokenizer is not None:
            raise ValueError(
                f"model.tokenizer={self.tokenizer} is for comparisons, and model.from={self.from_} starts"
                " with the tokenizer of that stage: remove one of the two"
            )

    def check(self, longest: int | None) -> Architecture:
        """Fetch only the configs; refuses an objective without `from_`, and stages of two architectures."""
        if longest is not None and self.from_ is None:
            raise ValueError(
                "model=chain/... compares finished stages: set objective=none, or model.from=STAGE to train"
                f" from one of {', '.join(self.stages)}"
            )
        directories = {
            name: directory
            for name, directory in self._fetched(weights=False).items()
            if not _adapts(directory, weights=False)
        }
        maps = {
            name: replace(load_architecture(directory), tied=True) for name, directory in directories.items()
        }
        for name, directory in directories.items():
            check_here(self._location(name), directory)
        needed = list(directories)[: None if self.from_ else -1 if self.neighbours else 1]
        for name in [self.tokenizer] if self.tokenizer else needed:
            if name in directories:
                check_tokenizer(directories[name], only_if_there=True)
        first, *others = maps
        for name in others:
            if maps[name] != maps[first]:
                raise ValueError(
                    f"{self._named(name)} differs in architecture from {self._named(first)}: all stages of a"
                    " chain must be checkpoints of one network"
                )
        if self.from_ is not None:
            check_length(longest or 0, load_context(directories[first]))
        return load_architecture(directories[first])

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, request: Request = no_request
    ) -> Base:
        """Fetch all stages that are needed, and merge those that are adapters."""
        by_name: dict[str, Path] = {}
        given: dict[str, Path] = {}  # an adapter's own directory, whose factors a pair is measured by
        for name, directory in self._fetched(weights=True).items():
            given[name] = by_name[name] = with_safetensors(directory, self.allow_bin, stage)
            if _adapts(given[name], weights=True):
                before = list(by_name)[-2]
                warn_of_other_base(given[name], self.stages[before])
                by_name[name] = self._merged(name, given[name], by_name[before], stage)
        if self.from_ is None:
            self._compare(by_name)
        ends = list(by_name.values())  # of the others each is checked when it is measured
        for directory in ends if self.from_ is not None else (ends[0], ends[-1]):
            architecture = load_architecture(directory)
            check_finite(open_params(directory, architecture), architecture, str(directory))
        if self.from_ is not None:
            start = by_name[self.from_]
            check_tokenizer(start)
            warn_of_generated_text(data, start)
            return Base(start, identity(start))
        first, *_ = directories = list(by_name.values())
        tokenizer = None if self.tokenizer is None else by_name[self.tokenizer]
        warn_of_generated_text(data, tokenizer or first)
        digest = hashlib.sha256(" ".join(map(identity, directories)).encode()).hexdigest()[:16]
        suffix = "" if self.tokenizer is None else f", {self.tokenizer}"
        return Base(
            tokenizer or first,
            f"chain/{digest}{suffix}",
            Trajectory("chain", dict(enumerate(directories)), stages=tuple(by_name)),
            tuple(
                pair_base(by_name[before], given[after], tokenizer or by_name[before])
                for before, after in pairwise(by_name)
                if self.neighbours
            ),
        )

    def _merged(self, name: str, adapter: Path, base: Path, stage: Stage) -> Path:
        def work(target: Path, log_metrics: Log) -> None:
            try:
                merge(adapter, base, target)
            except ValueError as error:
                raise ValueError(f"{self._named(name)}: {error}") from error

        return stage("merged", {"adapter": identity(adapter), "base": identity(base)}, work, 1)

    def locations(self) -> dict[str, str]:
        """The locations to fetch, by stage and in order.

        Raises:
            ValueError: if a hub name has no revision, or a branch that moves.
        """
        return {name: self._location(name) for name in self.stages}

    def outline(self, examples: Examples, data: Data) -> Outline:
        """The locations, and the config of the first stage, which is all that this fetches."""
        if self.from_ is not None:  # an adapter has the config of its base, and its sizes but for little
            base, *_ = self._fetched(weights=False)
            place = {0: self._location(base)}
            return outline_of(place, 0, self.allow_bin, self.trust_remote_code, self.cache)
        locations = dict(enumerate(self.locations().values()))
        outline = outline_of(locations, 0, self.allow_bin, self.trust_remote_code, self.cache)
        return replace(outline, pairs=len(locations) - 1 if self.neighbours else 0)

    def _location(self, name: str) -> str:
        location = self.stages[name].replace("{size}", self.size)
        if is_remote(location) and not hub_name(location):
            return location
        where, _, revision = location.partition("@")
        path = Path(location).expanduser()
        if path.is_dir() or is_gguf(path) or is_path(where.removeprefix("hf://")):
            return location  # `fetch` raises if the directory does not exist
        revision = revision or self.revisions.get(name)
        how = HOW_TO_PIN.format(key=f"model.revisions.{name}", name=where.removeprefix("hf://"))
        if not revision:
            raise ValueError(
                f"model.stages.{name}={where} is neither a directory nor a pinned hub name: {how}"
            )
        if revision in MOVING_REVISIONS:
            raise ValueError(f"model.revisions.{name}={revision} is a moving branch: {how}")
        return f"{where}@{revision}"

    def _fetched(self, weights: bool) -> dict[str, Path]:
        """The directories by stage, each checked to be a whole model and a different checkpoint.

        With `from_` only that stage, behind those that it adapts.
        """
        if self.from_ is None:
            fetched = {name: self._fetch(name, place, weights) for name, place in self.locations().items()}
        else:
            fetched, names = {}, list(self.stages)
            for name in reversed(names[: names.index(self.from_) + 1]):
                fetched = {name: self._fetch(name, self._location(name), weights), **fetched}
                if not _adapts(fetched[name], weights):
                    break
        first, *_ = fetched
        if _adapts(fetched[first], weights):
            raise ValueError(
                f"{self._named(first)} is an adapter, which has no weights of its own: put its base before"
                " it, as the first stage"
            )
        for before, after in combinations(fetched, 2):
            if fetched[before] == fetched[after]:
                raise ValueError(
                    f"model.stages.{after} and model.stages.{before} are the same checkpoint,"
                    f" {self._location(after)}: remove one of them"
                )
        return fetched

    def _fetch(self, name: str, location: str, weights: bool) -> Path:
        try:
            return fetch(location, self.allow_bin, self.trust_remote_code, weights, self.cache)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"in model.stages.{name}: {error}") from error

    def _compare(self, directories: Mapping[str, Path]) -> None:
        """Refuse two stages that are to be compared but differ in more than their vocabulary."""
        first, *later = directories
        pairs = [(first, name) for name in later[1 if self.neighbours else 0 :]]
        pairs = [*pairwise(directories), *pairs] if self.neighbours else pairs
        if self.tokenizer is not None:  # every stage but the last must have its vocabulary
            pairs += [(name, self.tokenizer) for name in list(directories)[:-1] if name != self.tokenizer]
        architecture_of = cache(load_architecture)
        for before, after in pairs:
            architecture = architecture_of(directories[before])
            try:
                same = same_vocabulary(directories[before], directories[after], architecture)
            except ValueError as error:
                raise ValueError(f"{self._named(after)} compared with stage {before}: {error}") from error
            warn_of_other_settings(directories[before], directories[after])
            warn_of_other_vocabulary(directories[before], directories[after])
            if after == self.tokenizer and not same:
                raise ValueError(
                    f"model.tokenizer={after} must have the vocabulary of every stage but the last, but stage"
                    f" {before} has a different number of embeddings: remove model.tokenizer"
                )

    def _named(self, name: str) -> str:
        return f"model.stages.{name}={self.stages[name]}"


def _adapts(directory: Path, weights: bool) -> bool:
    """Whether a stage is an adapter; merged models may keep its config, and only weights tell them apart."""
    return is_adapter(directory) and (weights or not (directory / "config.json").is_file())


def check_chain(chain: Chain, probes: Mapping[str, ProbeDeclaration], interventions: Sequence[str]) -> None:
    """Raise ValueError for probes and interventions that need one stage, where none is chosen."""
    if chain.from_ is not None:
        return
    names = ", ".join(chain.stages)
    if interventions:
        raise ValueError(
            f"intervention.{interventions[0]} edits one model, but a chain has several: set model.from=STAGE"
            f" to edit one of {names}, compare two stages with model=pair model.before=... model.after=...,"
            " or set intervention=[]"
        )
    if bad := [name for name, declaration in probes.items() if declaration.needs_objective]:
        others = [name for name in probes if name not in bad]
        raise ValueError(
            f"probe.{bad[0]} needs the training objective, which is unknown for the stages of a chain: give"
            f" one, such as +objective@probe.{bad[0]}.objective=dpo, set model.from=STAGE and an objective to"
            f" train from one of {names}, or choose probes without it, such as"
            f" probe=[{','.join(others) or 'rsf,behaviour'}]"
        )
