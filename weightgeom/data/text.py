"""A user's own text: plain files, JSON, CSV, TSV or parquet."""

import logging
import re
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.examples import Examples
from weightgeom.text.files import fingerprint, paths, split
from weightgeom.text.prompt_groups import ABSTENTIONS, group_contents, read_groups
from weightgeom.text.records import read_documents

log = logging.getLogger(__name__)
WORDS = 200  # per block, where documents are cut into blocks


@dataclass(frozen=True)
class TextFiles:
    """Documents from `train` (a file, a glob or a list of them), without pairs.

    Without `heldout`, every `heldout_every`-th distinct document is held out; if there are fewer documents
    than that, they are first cut into blocks of 200 words. With `heldout`, training omits the documents that
    also occur there. `groups` are prompt groups, read by `weightgeom.text.prompt_groups`.
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
            ValueError: if a file is unreadable or empty, or nothing is left to train on.
        """
        files = paths(self.train)
        heldout = None if self.heldout is None else _read_texts(paths(self.heldout))
        train = _read_texts(files)
        if heldout is None and len(set(train)) < self.heldout_every:
            train = _blocks(train, self.heldout_every)
        train, heldout = split(train, heldout, self.heldout_every, key=str)
        name = ", ".join(file.name for file in files)
        groups = read_groups(self.groups)
        digest = fingerprint(train, heldout, *group_contents(groups))
        abstentions = self.abstentions if groups else ()
        return Examples(name, train, heldout, [], [], digest=digest, groups=groups, abstentions=abstentions)


def _read_texts(files: list[Path]) -> list[str]:
    return [document for file in files for document in read_documents(file)]


def _blocks(documents: list[str], every: int) -> list[str]:
    """Blocks of 200 words, or fewer if a single document would give less than `every` blocks."""
    size = WORDS
    if len(documents) == 1:
        size = max(1, min(WORDS, len(documents[0].split()) // every))
    blocks = []
    for document in documents:
        starts = [word.start() for word in re.finditer(r"\S+", document)][::size]
        ends = [*starts[1:], len(document)]
        blocks += [document[i:j].strip() for i, j in zip(starts, ends, strict=True)]
    log.warning("cut %d documents into %d blocks of %d words", len(documents), len(blocks), size)
    return blocks
