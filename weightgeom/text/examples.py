"""Examples of a data set: documents, preference pairs and questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Text = str | list[dict[str, str]]
"""Plain text, or a conversation as a list of `{"role": ..., "content": ...}` messages."""


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt; `chosen` is preferred to `rejected`."""

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Question:
    """A prompt with its one correct answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Examples:
    """The validated content of a data set: documents and preference pairs, each with a held-out part.

    `questions` ask for facts stated in the documents. A part that the data set lacks is empty. `digest` is a
    SHA-256 over documents and pairs, and over the groups if there are any.

    `groups` are prompts grouped by how certain their answers are: the first group is the factual one, the
    baseline of the others. `abstentions` are the phrases that count as declining to answer.
    """

    name: str
    text: Sequence[str]
    heldout: Sequence[str]
    pairs: Sequence[Pair]
    heldout_pairs: Sequence[Pair]
    digest: str
    questions: Sequence[Question] = ()
    groups: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    abstentions: Sequence[str] = ()
