"""Finished stages of post-training, such as pretraining, SFT and DPO, to be compared with each other."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.bases.hub import MOVING, PIN, fetch, identity, is_path
from weightgeom.bases.outline import Outline
from weightgeom.bases.pretrained import converted, one_network, outlined, pair
from weightgeom.interfaces import Data, Stage
from weightgeom.interruption import Wanted, undisturbed
from weightgeom.models.adapters import is_adapter
from weightgeom.models.loading import load_architecture
from weightgeom.models.residual import Architecture
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Chain:
    """Two or more stages of one network by name, in order, the first being what the others started from.

    A stage is a directory, or a hub name, `{size}` filled in, with `@revision` or with its commit in
    `revisions`; a name without either is refused, as `main` is another model some day. Every stage is
    compared with the first and with the one before it, each in the subspaces of what it is compared with.
    The stages stand at steps 0, 1, 2, ... Text is tokenized, and chats are written, as the stage named by
    `tokenizer` does it, or without one as what a stage is compared with does. Stages may differ in dtype
    and in their number of embeddings, of which the shared ones are compared. `allow_bin` and
    `trust_remote_code` as `Pretrained` has them.
    """

    stages: dict[str, str]
    revisions: dict[str, str | None] = Field(default_factory=dict)
    size: str = ""
    tokenizer: str | None = None
    allow_bin: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no chain, and names that cannot be told apart."""
        names = list(self.stages)
        if len(names) < 2:
            raise ValueError(
                f"model.stages must name two stages or more, such as {{base: A, sft: B, dpo: C}}, got"
                f" {names or 'none'}"
            )
        if bad := [name for name in names if not NAME.fullmatch(name)]:
            raise ValueError(
                f"model.stages has the name {bad[0]!r}: a name is one word of letters, digits and any of _.+-"
            )
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(
                f"model.stages has a name twice but for upper and lower case, {', '.join(names)}:"
                " give each stage a name of its own"
            )
        if self.tokenizer is not None and self.tokenizer not in self.stages:
            raise ValueError(
                f"model.tokenizer={self.tokenizer} is no stage of this chain: give one of {', '.join(names)}"
            )

    def check(self, longest: int | None) -> Architecture:
        """Fetch the configs alone; refuses an objective, an adapter, and stages of several architectures."""
        if longest is not None:
            raise ValueError(
                "model=chain/... compares finished stages: add objective=none, or train from one of them by"
                " its own name with another model"
            )
        found = self._fetched(weights=False)
        maps = {name: replace(load_architecture(one), tied=True) for name, one in found.items()}
        first, *others = maps
        for name in others:
            if maps[name] != maps[first]:
                raise ValueError(
                    f"{self._told(name)} is of another architecture than {self._told(first)}: the stages of"
                    " a chain are one network at different times"
                )
        return load_architecture(found[first])

    def prepare(
        self, stage: Stage, examples: Examples, data: Data, device: str, wanted: Wanted = undisturbed
    ) -> Base:
        """Fetch all of them."""
        found = {
            name: converted(one, self.allow_bin, stage) for name, one in self._fetched(weights=True).items()
        }
        self._compare(found)
        first, *_ = directories = list(found.values())
        speaker = None if self.tokenizer is None else found[self.tokenizer]
        every = hashlib.sha256(" ".join(map(identity, directories)).encode()).hexdigest()[:16]
        by = "" if self.tokenizer is None else f", {self.tokenizer}"
        return Base(
            speaker or first,
            f"chain/{every}{by}",
            Trajectory("chain", dict(enumerate(directories)), stages=tuple(found)),
            tuple(pair(before, after, speaker or before) for before, after in pairwise(directories)),
        )

    def locations(self) -> dict[str, str]:
        """What to fetch, by stage and in order.

        Raises:
            ValueError: if a name of the hub has no revision, or one that moves.
        """
        return {name: self._location(name) for name in self.stages}

    def outline(self, examples: Examples, data: Data) -> Outline:
        """What is fetched, and the config of the first stage; fetches that config alone."""
        locations = dict(enumerate(self.locations().values()))
        found = outlined(locations, 0, self.allow_bin, self.trust_remote_code)
        return replace(found, pairs=len(locations) - 1)

    def _location(self, name: str) -> str:
        location = self.stages[name].replace("{size}", self.size)
        where, _, revision = location.partition("@")
        if Path(location).expanduser().is_dir() or is_path(where):
            return location  # fetch says if there is no such directory
        revision = revision or self.revisions.get(name)
        how = PIN.format(key=f"model.revisions.{name}", name=where)
        if not revision:
            raise ValueError(
                f"model.stages.{name}={where} is no directory here, and as a name of the hub it is not"
                f" pinned: {how}"
            )
        if revision in MOVING:
            raise ValueError(f"model.revisions.{name}={revision} moves: {how}")
        return f"{where}@{revision}"

    def _fetched(self, weights: bool) -> dict[str, Path]:
        """The directories by stage, each checked to be a whole model and no other stage's."""
        found: dict[str, Path] = {}
        for name, location in self.locations().items():
            try:
                one = fetch(location, self.allow_bin, self.trust_remote_code, weights)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"in model.stages.{name}: {error}") from error
            # Without the weights an adapter's config may stand beside a merged model.
            if is_adapter(one) and (weights or not (one / "config.json").is_file()):
                raise ValueError(
                    f"{self._told(name)} is an adapter: merge it into the stage that it was trained from,"
                    " with PEFT's merge_and_unload, and give the merged checkpoint"
                )
            if twin := [other for other, directory in found.items() if directory == one]:
                raise ValueError(
                    f"model.stages.{name} and model.stages.{twin[0]} are one checkpoint, {location}:"
                    " leave one of them out"
                )
            found[name] = one
        return found

    def _compare(self, found: Mapping[str, Path]) -> None:
        """Refuse two stages that are to be compared and differ in more than their vocabulary."""
        first, *later = found
        pairs = [*pairwise(found), *((first, name) for name in later[1:])]
        if self.tokenizer is not None:  # whose vocabulary every stage must have that others start from
            pairs += [(name, self.tokenizer) for name in list(found)[:-1] if name != self.tokenizer]
        for before, after in pairs:
            try:
                same = one_network(found[before], found[after], load_architecture(found[before]))
            except ValueError as error:
                raise ValueError(f"{self._told(after)} against stage {before}: {error}") from error
            if after == self.tokenizer and not same:
                raise ValueError(
                    f"model.tokenizer={after} needs the vocabulary of every stage but the last, and stage"
                    f" {before} has another number of embeddings: leave model.tokenizer out"
                )

    def _told(self, name: str) -> str:
        return f"model.stages.{name}={self.stages[name]}"


COMPARING = ("rsf", "behaviour", "spectrum", "overlap")  # probes of what changed since a start


def check_chain(probes: Sequence[str], interventions: Sequence[str]) -> None:
    """Raise ValueError for what is not defined on stages whose trainings are not known."""
    if interventions:
        raise ValueError(
            f"intervention.{interventions[0]} edits one trained model and a chain has several: choose two"
            " stages by model=pair model.before=... model.after=..., or leave intervention out"
        )
    if "moments" in probes:
        raise ValueError(
            "probe.moments needs the objective of a training, and those of a chain's stages are not known:"
            f" choose among {', '.join(COMPARING)}"
        )
