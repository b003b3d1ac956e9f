"""Conversations, checked and as text: by a tokenizer's chat template, plainly where it has none."""

import logging
import re
from functools import cache
from os.path import commonprefix
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from weightgeom.text.examples import Examples, Pair, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)
LABELS = {"system": "System", "user": "Human", "assistant": "Assistant"}  # role: how it is written
HEADER = "\n\nAssistant:"  # what asks for a response
CHAT_TEMPLATE = (
    f"{{% set labels = {LABELS} %}}"
    r"{% for message in messages %}"
    r"{{ '\n\n' + labels[message['role']] + ': ' + message['content'] }}"
    r"{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ {HEADER!r} }}}}{{% endif %}}"
)


def checked(value: Any, where: str) -> Text:
    """A string, or a conversation reduced to its roles and contents; ValueError on all else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a string or a list of messages, got {short(value)}")
    for message in value:
        known = isinstance(message, dict) and message.get("role") in tuple(LABELS)
        if not (known and isinstance(message.get("content"), str)):
            expected = f"role ({', '.join(LABELS)}) and a string content"
            raise ValueError(f"{where} needs messages with {expected}, got {short(message)}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def plain(text: Text) -> str:
    """A conversation as `CHAT_TEMPLATE` writes it, a string as it is."""
    if isinstance(text, str):
        return text
    return "".join(f"\n\n{LABELS[message['role']]}: {message['content']}" for message in text)


def implicit(chosen: Text, rejected: Text) -> Pair:
    """The pair whose prompt is what both texts share at the start, as TRL takes it.

    Where two dialogues written plainly also share the first words of the last response, the prompt
    ends before them, at the assistant's header (ours: TRL's would end within a word). It is empty if
    they share nothing, or if one ends where its response should begin.
    """
    shared, sides = 0, (chosen, rejected)
    unwritten = any(isinstance(side, str) and side.rstrip().endswith(HEADER) for side in sides)
    # TRL's function presumes a first element, and that it is shared
    if chosen and chosen[:1] == rejected[:1] and not unwritten:
        from trl.data_utils import extract_prompt

        prompt = extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"]
        header = prompt.rfind(HEADER) if isinstance(prompt, str) else -1
        shared = len(prompt) if header < 0 else header + len(HEADER)
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:])


def complete(pair: Pair) -> bool:
    """Whether the prompt and both responses say something: in a conversation, as the assistant."""

    def says(text: Text, *roles: str) -> bool:
        if isinstance(text, str):
            return bool(text.strip())
        return any(message["content"].strip() for message in text if message["role"] in roles)

    answers = says(pair.chosen, "assistant") and says(pair.rejected, "assistant")
    return answers and says(pair.prompt, *LABELS)


def render(pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> Pair:
    """The pair as strings: prompt + response is the tokenizer's rendering of the conversation.

    The prompt ends in the assistant's header where the responses start with its message. What the
    template writes differently with and without a response goes to the response.
    Source: the common prefix of `trl.data_utils.apply_chat_template`, which refuses some prompts.
    """
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return pair
    if tokenizer.chat_template is None:
        _note_plain(tokenizer.name_or_path)
    template = None if tokenizer.chat_template else CHAT_TEMPLATE  # None: the tokenizer's own

    begin = str(tokenizer.bos_token or "")
    begins_itself = bool(begin) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]

    def text(messages: list[dict[str, str]], header: bool = False) -> str:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=header
        )
        assert isinstance(rendered, str)
        # It is tokenized like any text later: what the tokenizer puts in front by itself is not doubled.
        return rendered.removeprefix(begin) if begins_itself else rendered

    header = chosen[0]["role"] == rejected[0]["role"] == "assistant"
    whole = text(prompt + chosen), text(prompt + rejected)
    start = commonprefix([text(prompt, header), *whole])  # noqa: RUF071 (characters are meant)
    return Pair(start, whole[0][len(start) :], whole[1][len(start) :])


@cache  # once for each tokenizer
def _note_plain(name: str) -> None:
    log.info("tokenizer %s has no chat template: conversations are written plainly", name)


Messages = list[dict[str, str]]


TURN = re.compile(rf"(?:^|\n\n)({'|'.join(LABELS.values())}):")


ROLES = {label: role for role, label in LABELS.items()}


def chats(examples: Examples, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The held-out pairs as prompt and chosen response, or else the held-out documents as user's messages.

    Raises:
        ValueError: if the tokenizer has no chat template, or this refuses a conversation.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {name} has no chat template: take text=raw, or of a pair the aligned model's"
            " tokenizer, with model.tokenizer=after"
        )
    conversations = [of_pair(pair) for pair in examples.heldout_pairs] or [
        of_text(text) for text in examples.heldout
    ]
    try:
        return [str(tokenizer.apply_chat_template(one, tokenize=False)) for one in conversations]
    except TemplateError as error:
        raise ValueError(
            f"the chat template of {name} refuses a conversation ({error}): take text=raw"
        ) from error


def of_pair(pair: Pair) -> Messages:
    """The prompt and the chosen response as messages."""
    if isinstance(pair.prompt, list) and isinstance(pair.chosen, list):
        return [*pair.prompt, *pair.chosen]
    prompt, chosen = str(pair.prompt), str(pair.chosen)
    if TURN.search(prompt):
        return of_text(prompt + chosen)
    return [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": chosen.strip()}]


def of_text(text: str) -> Messages:
    """A dialogue written plainly (`Human: …`, `Assistant: …`) as its turns; other text as a user's."""
    if TURN.match(text) is None:
        return [{"role": "user", "content": text}]
    _, *turns = TURN.split(text)
    return [
        {"role": ROLES[label], "content": content.strip()}
        for label, content in zip(turns[::2], turns[1::2], strict=True)
    ]
