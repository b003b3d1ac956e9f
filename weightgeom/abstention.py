"""Abstention phrases: which tokens they are, and what counts as abstaining."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightgeom.interfaces import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def check_groups(examples: Examples) -> None:
    """Raise ValueError if the data have no groups of prompts, or no abstention phrase."""
    if len(examples.groups) < 2:
        raise ValueError(
            f"{examples.name} has no groups of prompts: give data.groups, such as"
            " data.groups=[known,heldout,impossible] on the world or a JSONL file"
        )
    if not examples.abstentions:
        raise ValueError(f"{examples.name} has no abstention phrase: give data.abstentions")


def phrase_tokens(phrases: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of every phrase as they follow a prompt, without special ones.

    A phrase that the tokenizer splits is scored as a whole, token by token: a model abstains where each of
    its tokens is the most likely one in turn. Gradients and shifts of the logits are of the next token. The
    log says which phrases are split.

    Raises:
        ValueError: if a phrase has no token, or one that the tokenizer does not know.
    """
    found = []
    for phrase in phrases:
        ids = list(tokenizer(phrase, add_special_tokens=False)["input_ids"])
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"the abstention {phrase!r} has no token of its own in this model: name another")
        if len(ids) > 1:
            log.info(
                "the abstention %r is %d tokens (%s): it counts when each is the likeliest in turn",
                *(phrase, len(ids), " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))),
            )
        found.append(ids)
    return found


def first_tokens(phrases: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The first token of every phrase, none twice."""
    return sorted({ids[0] for ids in phrase_tokens(phrases, tokenizer)})
