"""A user's own preference pairs: with `chosen` and `rejected`, or `completion` and `label`."""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.conversation import plain_text
from weightgeom.text.examples import Examples, Pair
from weightgeom.text.files import fingerprint, paths, read_records, split
from weightgeom.text.prompt_groups import ABSTENTIONS, group_contents, read_groups
from weightgeom.text.records import pairs_of, text_of


@dataclass(frozen=True)
class Preferences:
    """Pairs from `train` (a file, a glob or a list of them); the text is each prompt + chosen response.

    The prompt is `prompt`, or one of the names in `weightgeom.text.records`; without one it is the responses'
    common prefix, as in TRL. Without `heldout`, every
    `heldout_every`-th prompt is held out with all its pairs; with `heldout`, training omits the pairs whose
    text occurs there. `groups` are prompt groups, read by `weightgeom.text.prompt_groups`.
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
            ValueError: if a file is unreadable or empty, a record is not a pair, or no pair is left.
        """
        files = paths(self.train)
        heldout = None if self.heldout is None else _read_pairs(paths(self.heldout))
        key = text_of if heldout else lambda pair: plain_text(pair.prompt)
        train, heldout = split(_read_pairs(files), heldout, self.heldout_every, key)
        parts = [text_of(pair) for pair in train], [text_of(pair) for pair in heldout], train, heldout
        groups = read_groups(self.groups)
        digest = fingerprint(*parts, *group_contents(groups))
        name = ", ".join(file.name for file in files)
        abstentions = self.abstentions if groups else ()
        return Examples(name, *parts, digest=digest, groups=groups, abstentions=abstentions)


def _read_pairs(files: list[Path]) -> list[Pair]:
    records = [record for file in files for record in read_records(file)]
    return pairs_of(records, ", ".join(map(str, files)))
