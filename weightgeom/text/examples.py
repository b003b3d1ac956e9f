"""Examples of a data set: documents, preference pairs and questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Text = str | list[dict[str, str]]
"""Plain text, or a conversation as a list of `{"role": ..., "content": ...}` messages."""


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, one preferred to the other."""

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Question:
    """A prompt with the one answer that is right."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Examples:
    """What a data set holds, read and checked: documents and preference pairs, each with a held-out part.

    `questions` ask for what the documents tell. A part that the data set does not have is empty. `digest`
    is a SHA-256 over documents and pairs, and over the groups where there are any.

    `groups` are prompts by how sure one can be of an answer: the first group's are the factual ones, which
    the others are compared with. `abstentions` are the phrases that stand for no answer.
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
