"""Records of data sets converted to preference pairs and documents, from the common column layouts."""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

from weightgeom.text.conversation import (
    TURN,
    Messages,
    checked_text,
    is_complete,
    plain_text,
    text_messages,
    with_shared_prompt,
)
from weightgeom.text.examples import Pair, Text
from weightgeom.text.files import field, is_plain, read_blocks, read_records

log = logging.getLogger(__name__)
Placed = Sequence[tuple[str, dict[str, Any]]]
"""Records with their names in errors, such as `FILE line 17`."""
CONVERSATIONS = ("messages", "conversation", "conversations")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
ANSWERS = ("completion", "response", "output", "answer")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def text_of(pair: Pair) -> str:
    """The prompt and the chosen response as plain text."""
    return plain_text(pair.prompt) + plain_text(pair.chosen)


def read_documents(path: Path) -> list[str]:
    """The documents of a file: of its records, or the blocks of plain text that blank lines separate."""
    documents = read_blocks(path) if is_plain(path) else documents_of(list(read_records(path)), str(path))
    if not (documents := [document for document in documents if document.strip()]):
        raise ValueError(f"{path} is empty: it contains no document")
    return documents


def has_pairs(records: Placed) -> bool:
    """Whether records hold preferences: chosen and rejected responses, or completions with a label."""
    columns = _columns(records)
    return "chosen" in columns or {"completion", "label"} <= set(columns)


def pairs_of(records: Placed, source: str) -> list[Pair]:
    """The preference pairs of records; `source` names them all.

    A record has `chosen` and `rejected`, or a `completion` with a `label`, true or false: completions of one
    prompt with different labels are paired. The prompt is a column of `PROMPTS`, or else the shared beginning
    of the responses. A prompt under another name than `prompt`, or with a `system` message, makes a
    conversation of strings. Prompts that every response repeats are taken off the responses. All that is
    dropped, undone or ignored is logged as a warning.

    Raises:
        ValueError: if a field is missing or malformed, or no pair is usable.
    """
    columns = _columns(records)
    prompt = next((name for name in PROMPTS if name in columns), None)
    labelled = "chosen" not in columns and {"completion", "label"} <= set(columns)
    responses = ("completion", "label") if labelled else ("chosen", "rejected")
    more = ["input"] if prompt == "instruction" else []
    _warn_ignored(records, [*responses, "system", *([prompt] if prompt else []), *more], source)
    taken = [name for name in ("system", prompt, *more) if name in columns]
    taken += [] if prompt else ["the beginning that both responses share"]
    if taken != ["prompt"]:
        log.info("the prompts in %s are %s", source, " and ".join(taken))
    read = _labelled_pair if labelled else _pair
    pairs = [read(where, record, prompt) for where, record in records]
    systems = [_system(where, record) for where, record in records]
    if labelled:
        pairs, systems = _matched(pairs, systems, source)
    pairs = _without_repeats(pairs, source)
    if prompt not in (None, "prompt") or "system" in columns:
        pairs = [_as_conversation(pair, system) for pair, system in zip(pairs, systems, strict=True)]
    return _usable(pairs, source)


def documents_of(records: Placed, source: str) -> list[str]:
    """The text of records: their `text`, their conversation, or their prompt and completion.

    Raises:
        ValueError: if a record has none of these.
    """
    columns = _columns(records)
    used = {"text"} if "text" in columns else {"system", *CONVERSATIONS, *PROMPTS, *ANSWERS}
    _warn_ignored(records, used, source)
    if "text" not in columns and {"completion", "label"} <= set(columns):
        log.warning("the labels in %s are not used: completions of either label are read as text", source)
    return [document_of(where, record) for where, record in records]


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
    prompt = next((name for name in PROMPTS if name in record), None)
    answer = next((name for name in ANSWERS if name in record), None)
    if prompt is None or answer is None:
        raise ValueError(
            f"{where} has no field 'text'; its fields are {', '.join(record)}: give it text, one of"
            f" {', '.join(CONVERSATIONS)}, or one of {', '.join(PROMPTS)} with one of {', '.join(ANSWERS)}"
        )
    start, end = _prompt(where, record, prompt), checked_text(record[answer], f"{where} field {answer!r}")
    pair, system = Pair("" if start is None else start, end, end), _system(where, record)
    if (prompt, answer) != ("prompt", "completion") or system:
        pair = _as_conversation(pair, system)
    return text_of(pair)


def _columns(records: Placed) -> list[str]:
    return list(dict.fromkeys(name for _, record in records for name in record))


def _warn_ignored(records: Placed, used: Collection[str], source: str) -> None:
    """Log the columns of text, pictures and sounds that are not used, and such parts of messages.

    Labels and identifiers of one word are no text.
    """
    ignored = [
        name
        for name in _columns(records)
        if name not in used
        and any(_is_text(record.get(name)) or (name in MEDIA and record.get(name)) for _, record in records)
    ]
    parts = {
        part
        for _, record in records
        for name in used
        if isinstance(record.get(name), list)
        for message in record[name]
        if isinstance(message, dict)
        for part, value in message.items()
        if part not in ("role", "content") and (_is_text(value) or (isinstance(value, list | dict) and value))
    }
    if parts:
        log.warning("the parts %s of messages in %s are not used", ", ".join(sorted(parts)), source)
    if ignored:
        log.warning(
            "the text columns %s in %s are not used; known names are text, system, chosen, rejected, %s, %s",
            *(", ".join(ignored), source, ", ".join((*CONVERSATIONS, *PROMPTS)), ", ".join(ANSWERS)),
        )


def _is_text(value: object) -> bool:
    """Whether a value holds text or a file: some words, or letters of a script that may not space them."""
    if isinstance(value, str):
        return len(value.split()) > 1 or (len(value) > 3 and not value.isascii())
    if isinstance(value, bytes):
        return bool(value)
    if isinstance(value, dict):
        return "content" in value or any(map(_is_text, value.values()))
    return isinstance(value, list) and any(map(_is_text, value))


def _prompt(where: str, record: dict, name: str | None) -> Text | None:
    """The prompt of a record, None without one; an `instruction` is followed by its `input`."""
    value = None if name is None else record.get(name)  # null counts as absent
    if value is None:
        return None
    prompt = checked_text(value, f"{where} field {name!r}")
    context = record.get("input") if name == "instruction" else None
    if not context or not isinstance(prompt, str):
        return prompt
    if not isinstance(context, str):
        raise ValueError(f"{where} field 'input' must be a string, got {short(context)}")
    return f"{prompt.rstrip()}\n\n{context}"


def _system(where: str, record: dict) -> str:
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"{where} field 'system' must be a string, got {short(system)}")
    return system


def _pair(where: str, record: dict, name: str | None) -> Pair:
    """The pair of a record with `chosen`, `rejected` and perhaps a prompt, which is its field `name`."""
    chosen = checked_text(field(record, "chosen", where), f"{where} field 'chosen'")
    rejected = checked_text(field(record, "rejected", where), f"{where} field 'rejected'")
    prompt = _prompt(where, record, name)
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        # Some data sets repeat the question as a string in addition to whole conversations.
        shared = [message["content"] for message in chosen if message in rejected]
        if prompt in shared:
            prompt = None
        elif name != "prompt":
            prompt = _turns(prompt)
    if len({type(side) for side in (prompt, chosen, rejected) if side is not None}) > 1:
        raise ValueError(f"{where} mixes strings and conversations: use one form for all its fields")
    return with_shared_prompt(chosen, rejected) if prompt is None else Pair(prompt, chosen, rejected)


def _labelled_pair(where: str, record: dict, name: str | None) -> Pair:
    """A prompt with its completion on the side of its label, and nothing on the other side."""
    completion = checked_text(field(record, "completion", where), f"{where} field 'completion'")
    prompt = _prompt(where, record, name)
    if prompt is None:
        known = ", ".join(PROMPTS)
        raise ValueError(f"{where} has a completion without a prompt: give it one of the columns {known}")
    if isinstance(prompt, str) and isinstance(completion, list) and name != "prompt":
        prompt = _turns(prompt)
    if type(prompt) is not type(completion):
        raise ValueError(f"{where} mixes strings and conversations: use one form for all its fields")
    label, nothing = field(record, "label", where), type(completion)()
    wanted = LABELS.get(str(label).strip().lower())
    if wanted is None:
        raise ValueError(f"{where} field 'label' must be true or false, got {short(label)}")
    return Pair(prompt, completion, nothing) if wanted else Pair(prompt, nothing, completion)


def _matched(halves: Sequence[Pair], systems: Sequence[str], source: str) -> tuple[list[Pair], list[str]]:
    """The n-th desirable and the n-th undesirable completion of every prompt, as a pair."""
    by_prompt: dict[str, tuple[list[Text], list[Text]]] = {}
    asked: dict[str, tuple[Text, str]] = {}
    for half, system in zip(halves, systems, strict=True):
        if not (half.chosen or half.rejected):
            continue
        key = json.dumps([system, half.prompt])
        asked[key] = half.prompt, system
        sides = by_prompt.setdefault(key, ([], []))
        sides[not half.chosen].append(half.chosen or half.rejected)
    pairs = [
        (Pair(asked[key][0], chosen, rejected), asked[key][1])
        for key, sides in by_prompt.items()
        for chosen, rejected in zip(*sides, strict=False)
    ]
    if not pairs:
        raise ValueError(
            f"no prompt in {source} has completions of both labels: pairs are made of a desirable and an"
            " undesirable completion of one prompt"
        )
    if left := len(halves) - 2 * len(pairs):
        log.warning(
            "%d of %d completions in %s are left out: their prompts have no other completion of the opposite"
            " label",
            *(left, len(halves), source),
        )
    return [pair for pair, _ in pairs], [system for _, system in pairs]


def _without_repeats(pairs: Sequence[Pair], source: str) -> list[Pair]:
    """The pairs without the prompt at the start of their responses, if every response repeats its prompt."""
    asked = [pair for pair in pairs if is_complete(pair)]
    repeated = sum(_unrepeated(pair) is not None for pair in asked)
    if repeated and repeated == len(asked):
        log.warning("every response in %s repeats its prompt: the repetitions are removed", source)
        return [_unrepeated(pair) or pair for pair in pairs]
    if 2 * repeated > len(asked):
        log.warning(
            "the responses of %d of %d pairs in %s repeat their prompt, and are kept as they are: remove it"
            " from all of them, or from none",
            *(repeated, len(asked), source),
        )
    return list(pairs)


def _unrepeated(pair: Pair) -> Pair | None:
    """The pair of the rests of its responses behind the prompt; None if one does not begin with it."""
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        bare, chosen, rejected = prompt.strip(), chosen.lstrip(), rejected.lstrip()
        if not bare or not (chosen.startswith(bare) and rejected.startswith(bare)):
            return None
        return Pair(prompt.rstrip(), chosen[len(bare) :], rejected[len(bare) :])
    n = len(prompt)
    if not n or chosen[:n] != prompt or rejected[:n] != prompt:
        return None
    return Pair(prompt, chosen[n:], rejected[n:])


def _as_conversation(pair: Pair, system: str) -> Pair:
    """The pair as messages, behind a system message if there is one and the prompt has none."""
    prompt = _turns(pair.prompt) if isinstance(pair.prompt, str) else pair.prompt
    if system and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    return Pair(prompt, _answer(pair.chosen), _answer(pair.rejected))


def _turns(prompt: str) -> Messages:
    """The messages of a prompt: a user's, or the turns of a plain-text dialogue."""
    messages = text_messages(prompt) if TURN.match(prompt) else [{"role": "user", "content": prompt.strip()}]
    return [message for message in messages if message["content"]]


def _answer(response: Text) -> Messages:
    if isinstance(response, str):
        return [{"role": "assistant", "content": response.strip()}]
    return response


def _usable(pairs: Sequence[Pair], source: str) -> list[Pair]:
    """The pairs with content and with different responses.

    Raises:
        ValueError: if none is left.
    """
    differing = [pair for pair in pairs if pair.chosen != pair.rejected]
    kept = [pair for pair in differing if is_complete(pair)]
    same, empty = len(pairs) - len(differing), len(differing) - len(kept)
    counts = f"{same} with chosen equal to rejected, {empty} with an empty prompt or response"
    if not kept:
        raise ValueError(f"none of the {len(pairs)} pairs in {source} is usable: {counts}")
    if same or empty:
        log.warning("dropped %d of %d pairs in %s: %s", same + empty, len(pairs), source, counts)
    return kept
