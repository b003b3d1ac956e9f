"""A user's own preference pairs: records with `chosen`, `rejected` and perhaps `prompt`."""

import logging
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.conversation import checked, complete, implicit, plain
from weightgeom.interfaces import Examples, Pair
from weightgeom.prompts import ABSTENTIONS, contents, read_groups
from weightgeom.reading import field, fingerprint, paths, place, read_records, split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preferences:
    """Pairs of `train`, a file, a glob or a list of them; the text is their prompt + chosen response.

    Without a field `prompt`, it is what the responses share at the start, as TRL takes it. Without
    `heldout`, every `heldout_every`-th prompt is held out with its pairs; with it, training leaves
    out the pairs whose text occurs there. `groups` are prompts, as `weightgeom.prompts` reads them.
    """

    train: str | list[str]
    heldout: str | list[str] | None = None
    heldout_every: int = Field(default=10, ge=2)
    groups: str | list[str] | None = None
    abstentions: list[str] = Field(default_factory=lambda: list(ABSTENTIONS), min_length=1)

    def files(self) -> list[Path]:
        """The files of `train`, then those of `heldout`."""
        return [*paths(self.train), *([] if self.heldout is None else paths(self.heldout))]

    def examples(self) -> Examples:
        """Read and check everything.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is unreadable or empty, a record is no pair, or none is left.
        """
        files = paths(self.train)
        heldout = None if self.heldout is None else _read(paths(self.heldout))
        key = _text if heldout else lambda pair: plain(pair.prompt)
        train, heldout = split(_read(files), heldout, self.heldout_every, key)
        parts = [_text(pair) for pair in train], [_text(pair) for pair in heldout], train, heldout
        groups = read_groups(self.groups)
        digest = fingerprint(*parts, *contents(groups))
        name = ", ".join(file.name for file in files)
        abstentions = self.abstentions if groups else ()
        return Examples(name, *parts, digest=digest, groups=groups, abstentions=abstentions)


def _text(pair: Pair) -> str:
    return plain(pair.prompt) + plain(pair.chosen)


def _read(files: list[Path]) -> list[Pair]:
    records = ((place(file, n), record) for file in files for n, record in read_records(file))
    found = [_pair(where, record) for where, record in records]
    differing = [pair for pair in found if pair.chosen != pair.rejected]
    kept = [pair for pair in differing if complete(pair)]
    same, empty = len(found) - len(differing), len(differing) - len(kept)
    counts = f"{same} with chosen equal to rejected, {empty} with an empty prompt or response"
    names = ", ".join(map(str, files))
    if not kept:
        raise ValueError(f"no pair is left of {len(found)} in {names}: {counts}")
    if same or empty:
        log.warning("dropped %d of %d pairs in %s: %s", same + empty, len(found), names, counts)
    return kept


def _pair(where: str, record: dict) -> Pair:
    chosen = checked(field(record, "chosen", where), f"{where} field 'chosen'")
    rejected = checked(field(record, "rejected", where), f"{where} field 'rejected'")
    prompt = record.get("prompt")  # null is none
    prompt = None if prompt is None else checked(prompt, f"{where} field 'prompt'")
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        # some data sets repeat the question as a string beside whole conversations
        shared = [message["content"] for message in chosen if message in rejected]
        prompt = None if prompt in shared else prompt
    if len({type(side) for side in (prompt, chosen, rejected) if side is not None}) > 1:
        raise ValueError(f"{where} mixes strings and conversations: make all its fields one kind")
    return implicit(chosen, rejected) if prompt is None else Pair(prompt, chosen, rejected)
