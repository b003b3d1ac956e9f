"""Records of data sets converted to preference pairs and documents, from the common column layouts."""

import logging
from collections.abc import Sequence
from reprlib import repr as short

from weightgeom.text.conversation import checked_text, is_complete, plain_text, with_shared_prompt
from weightgeom.text.examples import Pair
from weightgeom.text.files import field

log = logging.getLogger(__name__)
CONVERSATIONS = ("messages", "conversation", "conversations")


def text_of(pair: Pair) -> str:
    """The prompt and the chosen response as plain text."""
    return plain_text(pair.prompt) + plain_text(pair.chosen)


def usable_pairs(pairs: Sequence[Pair], names: str) -> list[Pair]:
    """The pairs with content and with different responses; `names` is their source.

    Raises:
        ValueError: if none is left.
    """
    differing = [pair for pair in pairs if pair.chosen != pair.rejected]
    kept = [pair for pair in differing if is_complete(pair)]
    same, empty = len(pairs) - len(differing), len(differing) - len(kept)
    counts = f"{same} with chosen equal to rejected, {empty} with an empty prompt or response"
    if not kept:
        raise ValueError(f"none of the {len(pairs)} pairs in {names} is usable: {counts}")
    if same or empty:
        log.warning("dropped %d of %d pairs in %s: %s", same + empty, len(pairs), names, counts)
    return kept


def document_of(where: str, record: dict) -> str:
    """The text of a record: its `text`, its conversation, or its prompt and completion.

    Raises:
        ValueError: if it has none of these.
    """
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            raise ValueError(f"{where} field 'text' must be a string, got {short(text)}")
        return text
    for name in CONVERSATIONS:
        if name in record:
            return plain_text(checked_text(record[name], f"{where} field {name!r}"))
    if "prompt" in record and "completion" in record:
        parts = (
            plain_text(checked_text(record[name], f"{where} field {name!r}"))
            for name in ("prompt", "completion")
        )
        return "".join(parts)
    raise ValueError(
        f"{where} must have chosen and rejected, or text, or one of {', '.join(CONVERSATIONS)}, or prompt and"
        f" completion; its columns are {', '.join(record)}"
    )


def pair_of(where: str, record: dict) -> Pair:
    """The preference pair of a record with fields `chosen`, `rejected` and optionally `prompt`.

    Raises:
        ValueError: if a field is missing or malformed.
    """
    chosen = checked_text(field(record, "chosen", where), f"{where} field 'chosen'")
    rejected = checked_text(field(record, "rejected", where), f"{where} field 'rejected'")
    prompt = record.get("prompt")  # null counts as absent
    prompt = None if prompt is None else checked_text(prompt, f"{where} field 'prompt'")
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        # Some data sets repeat the question as a string in addition to whole conversations.
        shared = [message["content"] for message in chosen if message in rejected]
        prompt = None if prompt in shared else prompt
    if len({type(side) for side in (prompt, chosen, rejected) if side is not None}) > 1:
        raise ValueError(f"{where} mixes strings and conversations: use one form for all its fields")
    return with_shared_prompt(chosen, rejected) if prompt is None else Pair(prompt, chosen, rejected)
