"""A Hub data set: its first `number` examples, in any common column layout."""

import logging
from itertools import islice

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.conversation import plain_text
from weightgeom.text.examples import Examples
from weightgeom.text.files import fingerprint, first_line, split
from weightgeom.text.records import Placed, documents_of, has_pairs, pairs_of, text_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubData:
    """The first `number` examples of a split: pairs if it has `chosen` and `rejected`, else documents.

    With `streaming`, only the examples in use are downloaded; without, the whole split goes into the cache
    and can be used offline. `revision` is a commit; the default is the commit in `pins`, or else the newest
    one, which only the examples' digest then identifies. Empty documents are skipped. The held-out part is
    the first `number` examples of `heldout_split`, or every `heldout_every`-th example.
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
            FileNotFoundError: if the split is neither on the hub nor in its local cache.
            ValueError: if the columns have no common layout, or too little is left.
        """
        revision = self.revision or self.pins.get(self.name)
        if revision is None:
            log.warning(
                "%s is not pinned: set data.revision=COMMIT to get the same examples again", self.name
            )
        train = self._read(self.split, revision)
        test = None if self.heldout_split is None else self._read(self.heldout_split, revision)
        name = f"{self.name}@{revision}" if revision else self.name
        if has_pairs(train):
            heldout = None if test is None else pairs_of(test, self.name)
            key = text_of if heldout else lambda pair: plain_text(pair.prompt)
            pairs, heldout_pairs = split(pairs_of(train, self.name), heldout, self.heldout_every, key)
            text, heldout_text = [text_of(pair) for pair in pairs], [text_of(pair) for pair in heldout_pairs]
        else:
            pairs, heldout_pairs, heldout = [], [], None if test is None else documents_of(test, self.name)
            text, heldout_text = split(documents_of(train, self.name), heldout, self.heldout_every, str)
        parts = text, heldout_text, pairs, heldout_pairs
        return Examples(name, *parts, digest=fingerprint(*parts))

    def _read(self, split: str, revision: str | None) -> Placed:
        """The first `number` records of a split, skipping empty text."""
        from datasets import load_dataset

        try:
            data = load_dataset(
                self.name, self.subset, split=split, revision=revision, streaming=self.streaming
            )
            records = (dict(record) for record in data)  # pyright: ignore[reportArgumentType, reportCallIssue]
            nonempty = (record for record in records if record.get("text") is None or record["text"].strip())
            first = list(islice(nonempty, self.number))
        except Exception as error:  # the hub's, the network's and the reader's errors share no base class
            raise FileNotFoundError(
                f"cannot get the split {split} of {self.name} from the hub or its local cache"
                f" ({first_line(error)}): check its name, subset, split and revision, and the network"
            ) from error
        if len(first) < self.number:
            log.warning("%s has %d examples in %s, not %d", self.name, len(first), split, self.number)
        if not first:
            raise ValueError(f"the split {split} of {self.name} is empty: choose another data.split")
        return [(f"{self.name} row {number}", record) for number, record in enumerate(first, 1)]
