"""A data set of the hub by its name: so many of its first examples, of whichever usual columns it has."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.conversation import plain
from weightgeom.text.examples import Examples, Pair
from weightgeom.text.files import fingerprint, first_line, split
from weightgeom.text.records import document_of, pair_of, text_of, usable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubData:
    """The first `number` examples of a split: pairs where it has `chosen` and `rejected`, else documents.

    With `streaming` no more is downloaded than what is used; without, the whole split goes into the cache,
    from which it can be had offline. `revision` is a commit; without it, that of `pins`, or the newest, which
    the digest of the examples then tells from another. Empty documents do not count. Held out is
    `heldout_split`, `number` of it at most, or every `heldout_every`-th.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    heldout_split: str | None = None
    revision: str | None = None
    pins: dict[str, str] = Field(default_factory=dict)
    number: int = Field(default=1000, ge=2)
    streaming: bool = True
    heldout_every: int = Field(default=10, ge=2)

    def examples(self) -> Examples:
        """Download and check everything.

        Raises:
            FileNotFoundError: if the hub or its cache does not give it.
            ValueError: if its columns are not the usual ones, or too little is left.
        """
        revision = self.revision or self.pins.get(self.name)
        if revision is None:
            log.warning("%s is not pinned: data.revision=COMMIT gets the same again", self.name)
        train = self._read(self.split, revision)
        held = None if self.heldout_split is None else self._read(self.heldout_split, revision)
        name = f"{self.name}@{revision}" if revision else self.name
        if "chosen" in train[0]:
            heldout = None if held is None else self._pairs(held)
            key = text_of if heldout else lambda pair: plain(pair.prompt)
            pairs, held_pairs = split(self._pairs(train), heldout, self.heldout_every, key)
            text, held_text = [text_of(pair) for pair in pairs], [text_of(pair) for pair in held_pairs]
        else:
            pairs, held_pairs, heldout = [], [], None if held is None else self._documents(held)
            text, held_text = split(self._documents(train), heldout, self.heldout_every, str)
        parts = text, held_text, pairs, held_pairs
        return Examples(name, *parts, digest=fingerprint(*parts))

    def _read(self, split: str, revision: str | None) -> list[dict[str, Any]]:
        """The first records of a split that are not empty text."""
        from datasets import load_dataset

        try:
            data = load_dataset(
                self.name, self.subset, split=split, revision=revision, streaming=self.streaming
            )
            records = (dict(record) for record in data)  # pyright: ignore[reportArgumentType, reportCallIssue]
            full = (record for record in records if record.get("text") is None or record["text"].strip())
            found = list(islice(full, self.number))
        except Exception as error:  # the hub's, the network's and the reader's errors share no base class
            raise FileNotFoundError(
                f"cannot get the split {split} of {self.name} from the hub or its local cache"
                f" ({first_line(error)}): check its name, subset, split and revision, and the network"
            ) from error
        if len(found) < self.number:
            log.warning("%s has %d examples in %s, not %d", self.name, len(found), split, self.number)
        if not found:
            raise ValueError(f"the split {split} of {self.name} is empty")
        return found

    def _pairs(self, records: list[dict[str, Any]]) -> list[Pair]:
        return usable([pair_of(*one) for one in self._placed(records)], self.name)

    def _documents(self, records: list[dict[str, Any]]) -> list[str]:
        return [document_of(*one) for one in self._placed(records)]

    def _placed(self, records: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, record in enumerate(records, 1):
            yield f"{self.name} row {number}", record
