"""Held-out text as the conversations that a model was aligned on, written by its own chat template."""

import re
from typing import TYPE_CHECKING

from weightgeom.conversation import LABELS
from weightgeom.interfaces import Examples, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
TURN = re.compile(rf"(?:^|\n\n)({'|'.join(LABELS.values())}):")
ROLES = {label: role for role, label in LABELS.items()}


def chats(examples: Examples, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The held-out pairs as prompt and chosen response, or else the held-out documents as user's messages.

    Raises:
        ValueError: if the tokenizer has no chat template, or this refuses a conversation.
    """
    from jinja2 import TemplateError  # noqa: PLC0415 (heavy, with its sandbox)

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
