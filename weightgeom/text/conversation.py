"""Conversations: validated, and rendered as text by the tokenizer's chat template or as plain text."""

import logging
import re
from collections.abc import Sequence
from functools import cache
from os.path import commonprefix
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from weightgeom.text.examples import Examples, Pair, Text
from weightgeom.text.templates import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)
Messages = list[dict[str, str]]
LABELS = {"system": "System", "user": "Human", "assistant": "Assistant"}  # role: its label in plain text
# A list of messages as json.dumps, str and NumPy write one.
WRITTEN = re.compile(
    r"""(?s)\s*(array\()?\[\s*\{\s*["'](role|content|from|value)["']\s*:.*\}\s*\](\s*,\s*dtype=object)?\)?\s*"""
)
HEADER = "\n\nAssistant:"  # ends a prompt; the response follows
CHAT_TEMPLATE = (
    f"{{% set labels = {LABELS} %}}"
    r"{% for message in messages %}"
    r"{{ '\n\n' + labels[message['role']] + ': ' + message['content'] }}"
    r"{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ {HEADER!r} }}}}{{% endif %}}"
)


def checked_text(value: Any, where: str) -> Text:
    """A string, or a conversation reduced to its roles and contents; ValueError on anything else."""
    if isinstance(value, str):
        if WRITTEN.fullmatch(value):
            raise ValueError(
                f"{where} is a list of messages that was written as text: write the list itself, in JSON or"
                f" parquet, got {short(value)}"
            )
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a string or a list of messages, got {short(value)}")
    for message in value:
        known = isinstance(message, dict) and message.get("role") in tuple(LABELS)
        if not (known and isinstance(message.get("content"), str)):
            expected = f"a role ({', '.join(LABELS)}) and a string content"
            raise ValueError(f"{where} needs messages with {expected}, got {short(message)}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def plain_text(text: Text) -> str:
    """A conversation as a plain-text dialogue; a string is returned unchanged."""
    if isinstance(text, str):
        return text
    return "".join(f"\n\n{LABELS[message['role']]}: {message['content']}" for message in text)


def with_shared_prompt(chosen: Text, rejected: Text) -> Pair:
    """The pair of two texts that contain their prompt: the prompt is their common prefix, as in TRL.

    If two plain-text dialogues also share the first words of the last response, the prompt ends before
    those words, at the assistant's header (ours: TRL's would end within a word). The prompt is empty if the
    texts share nothing, or if one text ends where its response should begin.
    """
    shared, sides = 0, (chosen, rejected)
    unwritten = any(isinstance(side, str) and side.rstrip().endswith(HEADER) for side in sides)
    # TRL's function assumes that both texts have a first element and share it.
    if chosen and chosen[:1] == rejected[:1] and not unwritten:
        from trl.data_utils import extract_prompt

        prompt = extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"]
        header = prompt.rfind(HEADER) if isinstance(prompt, str) else -1
        shared = len(prompt) if header < 0 else header + len(HEADER)
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:])


def is_complete(pair: Pair) -> bool:
    """Whether the prompt and both responses have content; in a conversation, the assistant's content."""

    def says(text: Text, *roles: str) -> bool:
        if isinstance(text, str):
            return bool(text.strip())
        return any(message["content"].strip() for message in text if message["role"] in roles)

    answers = says(pair.chosen, "assistant") and says(pair.rejected, "assistant")
    return answers and says(pair.prompt, *LABELS)


def is_conversation(pair: Pair) -> bool:
    """Whether the prompt and both responses are messages."""
    return all(isinstance(side, list) for side in (pair.prompt, pair.chosen, pair.rejected))


def for_trl(pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase") -> list[Pair]:
    """The pairs as TRL's trainers take them: conversations without a chat template as plain text.

    Raises:
        ValueError: if some pairs are strings and others are conversations, for a tokenizer with a template.
    """
    if tokenizer.chat_template is None:
        return [render(pair, tokenizer) for pair in pairs]
    conversations = sum(map(is_conversation, pairs))
    if 0 < conversations < len(pairs):
        raise ValueError(
            f"{conversations} of {len(pairs)} pairs are conversations and the others strings: TRL trains on"
            " one form, so write all of them as messages"
        )
    return list(pairs)


def render(pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> Pair:
    """The pair as strings, such that prompt + response is the tokenizer's rendering of the conversation.

    For a trainer that takes strings alone; one that takes messages tokenizes them better. The prompt ends in
    the assistant's header if the responses start with an assistant's message. Text that the template renders
    differently with and without a response belongs to the response.
    Source: the common prefix of `trl.data_utils.apply_chat_template`, which refuses some prompts.
    """
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return pair
    header = chosen[0]["role"] == rejected[0]["role"] == "assistant"
    if tokenizer.chat_template is None:
        _note_plain(tokenizer.name_or_path)
        start, *whole = (plain_text(text) for text in (prompt, prompt + chosen, prompt + rejected))
        start += HEADER if header else ""
    else:
        start, *whole = rendered([(prompt, header), *_wholes(pair)], tokenizer)
    begin = str(tokenizer.bos_token or "")
    if begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        # The tokenizer adds its start token again when it tokenizes this text.
        start, *whole = (text.removeprefix(begin) for text in (start, *whole))
    start = commonprefix([start, *whole])  # noqa: RUF071 (characters are meant)
    return Pair(start, whole[0][len(start) :], whole[1][len(start) :])


def renderings(pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, str, str]]:
    """Of every conversation the prompt with the assistant's header, and the whole with each response."""
    conversations = [conversation for pair in pairs for conversation in ((pair.prompt, True), *_wholes(pair))]
    texts = iter(rendered(conversations, tokenizer))  # pyright: ignore[reportArgumentType]
    return list(zip(texts, texts, texts, strict=True))


def _wholes(pair: Pair) -> list[tuple[Messages, bool]]:
    return [(pair.prompt + side, False) for side in (pair.chosen, pair.rejected)]  # pyright: ignore


@cache  # logs once per tokenizer
def _note_plain(name: str) -> None:
    log.info("tokenizer %s has no chat template: conversations are rendered as plain text", name)


TURN = re.compile(rf"(?:^|\n\n)({'|'.join(LABELS.values())}):")


ROLE_OF_LABEL = {label: role for role, label in LABELS.items()}


def chats(examples: Examples, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Held-out chats: prompts with their chosen responses, or without pairs the documents as user messages.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template refuses a conversation.
    """
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {name} has no chat template: set text=raw, or for model=pair use the tokenizer of"
            " the aligned model with model.tokenizer=after"
        )
    conversations = [pair_messages(pair) for pair in examples.heldout_pairs] or [
        text_messages(text) for text in examples.heldout
    ]
    try:
        return rendered([(chat, False) for chat in conversations], tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}: set text=raw") from error


def pair_messages(pair: Pair) -> Messages:
    """The prompt and the chosen response as messages."""
    if isinstance(pair.prompt, list) and isinstance(pair.chosen, list):
        return [*pair.prompt, *pair.chosen]
    prompt, chosen = str(pair.prompt), str(pair.chosen)
    if TURN.search(prompt):
        return text_messages(prompt + chosen)
    return [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": chosen.strip()}]


def text_messages(text: str) -> Messages:
    """The turns of a plain-text dialogue (`Human: …`, `Assistant: …`); other text is one user message."""
    if TURN.match(text) is None:
        return [{"role": "user", "content": text}]
    _, *turns = TURN.split(text)
    return [
        {"role": ROLE_OF_LABEL[label], "content": content.strip()}
        for label, content in zip(turns[::2], turns[1::2], strict=True)
    ]
