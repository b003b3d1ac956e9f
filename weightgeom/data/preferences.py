"""A user's own preference pairs: records with `chosen`, `rejected` and perhaps `prompt`."""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.conversation import plain
from weightgeom.text.examples import Examples, Pair
from weightgeom.text.files import fingerprint, paths, place, read_records, split
from weightgeom.text.prompt_groups import ABSTENTIONS, contents, read_groups
from weightgeom.text.records import pair_of, text_of, usable


@dataclass(frozen=True)
class Preferences:
    """Pairs of `train`, a file, a glob or a list of them; the text is their prompt + chosen response.

    Without a field `prompt`, it is what the responses share at the start, as TRL takes it. Without
    `heldout`, every `heldout_every`-th prompt is held out with its pairs; with it, training leaves
    out the pairs whose text occurs there. `groups` are prompts, as `weightgeom.text.prompt_groups` reads
    them.
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
        key = text_of if heldout else lambda pair: plain(pair.prompt)
        train, heldout = split(_read(files), heldout, self.heldout_every, key)
        parts = [text_of(pair) for pair in train], [text_of(pair) for pair in heldout], train, heldout
        groups = read_groups(self.groups)
        digest = fingerprint(*parts, *contents(groups))
        name = ", ".join(file.name for file in files)
        abstentions = self.abstentions if groups else ()
        return Examples(name, *parts, digest=digest, groups=groups, abstentions=abstentions)


def _read(files: list[Path]) -> list[Pair]:
    records = ((place(file, n), record) for file in files for n, record in read_records(file))
    found = [pair_of(where, record) for where, record in records]
    return usable(found, ", ".join(map(str, files)))
