"""Token batches: packed documents, responses behind their prompts, answers and prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from weightgeom.text.conversation import is_conversation, render, renderings
from weightgeom.text.examples import Pair, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences, padded on either side; `target` marks the tokens whose prediction is scored."""

    input_ids: Int[Tensor, "sequence position"]
    attention_mask: Int[Tensor, "sequence position"]
    target: Bool[Tensor, "sequence position"]

    def positions(self) -> Int[Tensor, "sequence position"]:
        """The position of each token in its sequence, not counting padding on the left."""
        leading = (self.attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
        places = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (places - leading).clamp(min=0)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.target.to(device))


def packed(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    limit: int,
    size: int = 16,
    *,
    closed: bool = False,
) -> list[Batch]:
    """Documents concatenated, each closed by the end token, and split into sequences of `length` tokens.

    At most `limit` tokens, in batches of `size` sequences; a shorter last sequence is padded. Every token
    but the first of a sequence is a target. With `closed`, the documents end as they should already: a chat
    template closes its conversations.

    Raises:
        ValueError: if the texts have fewer than 2 tokens.
    """
    end, name = tokenizer.eos_token_id, str(tokenizer.eos_token)
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if isinstance(end, int) and not closed and not text.endswith(name):
            stream.append(end)
        if len(stream) >= limit:
            break
    stream = stream[:limit]
    if len(stream) < 2:
        raise ValueError("the held-out text has fewer than 2 tokens: give more text with data.heldout")
    sequences = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [
        _batch([(sequence, 1) for sequence in part], tokenizer)
        for part in _chunks([sequence for sequence in sequences if len(sequence) > 1], size)
    ]


def responses(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase", length: int, size: int = 16
) -> Iterator[tuple[Batch, Batch]]:
    """Chosen and rejected responses behind their prompts, `size` pairs at a time.

    The responses' tokens are the targets. Pairs are tokenized, closed by the end token and truncated to
    `length` as in TRL; a pair whose prompt leaves no room for a response is dropped.
    """
    kept = [tokens for tokens in tokenized(pairs, tokenizer) if len(tokens[0]) < length]
    for part in _chunks(kept, size):
        chosen = [((prompt + response)[:length], len(prompt)) for prompt, response, _ in part]
        rejected = [((prompt + response)[:length], len(prompt)) for prompt, _, response in part]
        yield _batch(chosen, tokenizer), _batch(rejected, tokenizer)


def answers(
    questions: Sequence[Question], tokenizer: "PreTrainedTokenizerBase", size: int = 64
) -> Iterator[Batch]:
    """Questions followed by their answers, whose tokens are the targets; `size` at a time."""
    for part in _chunks(questions, size):
        sequences = []
        for question in part:
            prompt, whole = (
                list(tokenizer(text)["input_ids"])
                for text in (question.prompt, question.prompt + question.answer)
            )
            sequences.append((whole, _common(prompt, whole)))
        yield _batch(sequences, tokenizer)


def prompts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Batch:
    """Prompts in one batch, padded on the tokenizer's side; the target is the last token of each prompt.

    Raises:
        ValueError: if a prompt has no token.
    """
    tokens = [list(tokenizer(text)["input_ids"]) for text in texts]
    if empty := [text for text, ids in zip(texts, tokens, strict=True) if not ids]:
        raise ValueError(f"the prompt {empty[0]!r} has no token")
    longest = max(map(len, tokens))
    fill = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    ids = torch.full((len(tokens), longest), fill)
    mask = torch.zeros_like(ids)
    target = torch.zeros_like(ids, dtype=torch.bool)
    for index, prompt in enumerate(tokens):
        start = longest - len(prompt) if tokenizer.padding_side == "left" else 0
        ids[index, start : start + len(prompt)] = torch.tensor(prompt)
        mask[index, start : start + len(prompt)] = 1
        target[index, start + len(prompt) - 1] = True
    return Batch(ids, mask, target)


def tokenize(pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int], list[int]]:
    """`tokenized` of a single pair."""
    return tokenized([pair], tokenizer)[0]


def tokenized(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens of each prompt, chosen and rejected response, split where TRL's preference trainers split them.

    A response starts where the tokens of prompt + response diverge from those of the prompt. Conversations
    end as the chat template ends them, strings in the end token.
    """
    tokens = []
    for prompt, chosen, rejected in _whole_tokens(pairs, tokenizer):
        shared = min(_common(prompt, chosen), _common(prompt, rejected))
        tokens.append((prompt[:shared], chosen[shared:], rejected[shared:]))
    return tokens


def tokenized_responses(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], int, list[int], int]]:
    """Tokens of each prompt + chosen, then of prompt + rejected, with the number that belong to the prompt.

    As TRL's trainers on single responses split them: without a look at the other response.
    """
    return [
        (chosen, _common(prompt, chosen), rejected, _common(prompt, rejected))
        for prompt, chosen, rejected in _whole_tokens(pairs, tokenizer)
    ]


def _whole_tokens(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Tokens of each prompt, of prompt + chosen, and of prompt + rejected.

    A chat template writes all special tokens itself; the tokenizer adds its own to strings alone.
    """
    templated = bool(tokenizer.chat_template)
    texts = iter(renderings([pair for pair in pairs if templated and is_conversation(pair)], tokenizer))
    for pair in pairs:
        strings = not (templated and is_conversation(pair))
        three = _strings(render(pair, tokenizer), str(tokenizer.eos_token or "")) if strings else next(texts)
        prompt, chosen, rejected = (
            list(tokenizer(text, add_special_tokens=strings)["input_ids"]) for text in three
        )
        yield prompt, chosen, rejected


def _strings(pair: Pair, end: str) -> tuple[str, str, str]:
    start = str(pair.prompt)
    return start, start + _closed(str(pair.chosen), end), start + _closed(str(pair.rejected), end)


def _closed(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def _common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _batch(sequences: Sequence[tuple[list[int], int]], tokenizer: "PreTrainedTokenizerBase") -> Batch:
    """Sequences padded on the right; each is (tokens, number of leading tokens that are not targets)."""
    longest = max(len(tokens) for tokens, _ in sequences)
    fill = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    ids = torch.full((len(sequences), longest), fill)
    mask = torch.zeros_like(ids)
    target = torch.zeros_like(ids, dtype=torch.bool)
    for index, (tokens, start) in enumerate(sequences):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        target[index, max(start, 1) : len(tokens)] = True
    return Batch(ids, mask, target)
