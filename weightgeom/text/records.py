"""Records of data sets as preference pairs and documents, by the columns that are usual for them."""

import logging
from collections.abc import Sequence
from reprlib import repr as short

from weightgeom.text.conversation import checked, complete, implicit, plain
from weightgeom.text.examples import Pair
from weightgeom.text.files import field

log = logging.getLogger(__name__)
CONVERSATIONS = ("messages", "conversation", "conversations")


def text_of(pair: Pair) -> str:
    """The prompt and the chosen response, plainly."""
    return plain(pair.prompt) + plain(pair.chosen)


def usable(pairs: Sequence[Pair], names: str) -> list[Pair]:
    """The pairs whose responses differ and that say something; `names` is where they come from.

    Raises:
        ValueError: if none is left.
    """
    differing = [pair for pair in pairs if pair.chosen != pair.rejected]
    kept = [pair for pair in differing if complete(pair)]
    same, empty = len(pairs) - len(differing), len(differing) - len(kept)
    counts = f"{same} with chosen equal to rejected, {empty} with an empty prompt or response"
    if not kept:
        raise ValueError(f"no pair is left of {len(pairs)} in {names}: {counts}")
    if same or empty:
        log.warning("dropped %d of %d pairs in %s: %s", same + empty, len(pairs), names, counts)
    return kept


def document_of(where: str, record: dict) -> str:
    """The text of a record: its `text`, its conversation, or its prompt and completion.

    Raises:
        ValueError: if it has none of these, naming the columns that it has.
    """
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            raise ValueError(f"{where} field 'text' must be a string, got {short(text)}")
        return text
    for name in CONVERSATIONS:
        if name in record:
            return plain(checked(record[name], f"{where} field {name!r}"))
    if "prompt" in record and "completion" in record:
        parts = (plain(checked(record[name], f"{where} field {name!r}")) for name in ("prompt", "completion"))
        return "".join(parts)
    raise ValueError(
        f"{where} has neither chosen and rejected, nor text, nor {', '.join(CONVERSATIONS)}, nor prompt and"
        f" completion; its columns are {', '.join(record)}"
    )


def pair_of(where: str, record: dict) -> Pair:
    """The preference pair of a record with `chosen`, `rejected` and perhaps `prompt`.

    Raises:
        ValueError: if it is none.
    """
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
