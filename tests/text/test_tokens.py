from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from weightgeom.text.conversation import render
from weightgeom.text.examples import Pair, Question
from weightgeom.text.tokens import (
    Batch,
    answers,
    packed,
    responses,
    tokenize,
    tokenized,
    tokenized_responses,
)

# Writes the beginning itself, and closes every message.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As the families of models write conversations: the last ends them in no end token, the first behind it.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<eos>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "mistral": MISTRAL, "gemma": GEMMA}


def words(*more: str) -> PreTrainedTokenizerFast:
    """<pad> 0, <eos> 1, then a to h as 2 to 9."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *"abcdefgh", *more])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def bpe(texts: list[str], *, begins: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which joins spaces to words; it puts <bos> in front if `begins`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special: Any = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def trl_tokens(
    pairs: list[Pair], tokenizer: Any, length: int | None = None
) -> list[tuple[list[int], list[int], list[int]]]:
    """The data that TRL's trainer trains on: prompt, chosen and rejected tokens."""
    PartialState()  # TRL logs by way of accelerate, which wants it
    datasets.disable_progress_bars()
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    arguments: Any = SimpleNamespace(dataset_num_proc=None, max_length=length, truncation_mode="keep_start")
    dataset = datasets.Dataset.from_list([vars(pair) for pair in pairs])
    prepared = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "train")
    rows: Any = list(prepared)
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


def trl_rows(kind: Any, columns: dict[str, list[Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """A data set as TRL's trainer of single responses prepares it."""
    PartialState()
    datasets.disable_progress_bars()
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=True, calculate_KL=False
    )
    arguments: Any = SimpleNamespace(
        **dict.fromkeys(("dataset_num_proc", "max_length", "assistant_only_loss", "shuffle_dataset")),
        dataset_text_field="text",
    )
    more = {"packing": False, "formatting_func": None} if kind is SFTTrainer else {}
    dataset = datasets.Dataset.from_dict(columns)
    return list(kind._prepare_dataset(trainer, dataset, tokenizer, arguments, dataset_name="eval", **more))


def conversation(pair: Pair) -> Pair:
    """The same pair as messages."""

    def message(role: str, text: Any) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    sides = (message("assistant", side) for side in (pair.chosen, pair.rejected))
    return Pair(message("user", pair.prompt), *sides)


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Of every sequence, the unpadded tokens and the positions of the targets."""
    kept = zip(batch.input_ids, batch.attention_mask.bool(), batch.target, strict=True)
    return [(ids[mask].tolist(), target.nonzero()[:, 0].tolist()) for ids, mask, target in kept]


def test_documents_are_packed_end_to_end_with_the_end_token_between():
    (batch,) = packed(["a b", "c d e", "f"], words(), length=4, limit=100)
    # a b <eos> c | d e <eos> f | <eos>: a rest of one token predicts nothing and is left out
    assert batch.input_ids.tolist() == [[2, 3, 1, 4], [5, 6, 1, 7]]
    assert batch.attention_mask.tolist() == [[1] * 4] * 2
    assert batch.target.tolist() == [[False, True, True, True]] * 2


def test_a_shorter_last_sequence_is_padded_and_padding_is_not_a_target():
    (batch,) = packed(["a b c d", "e"], words(), length=4, limit=100)
    assert batch.input_ids.tolist() == [[2, 3, 4, 5], [1, 6, 1, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.target.tolist() == [[False, True, True, True], [False, True, True, False]]


def test_no_more_than_limit_tokens_are_packed_in_batches_of_size_sequences():
    batches = packed(["a b c"] * 10, words(), length=2, limit=10, size=2)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 2), (2, 2), (1, 2)]
    assert batches[2].input_ids.tolist() == [[2, 3]]


def test_packing_puts_no_token_of_the_tokenizer_between(examples):
    tokenizer = bpe(examples.text, begins=True)
    (batch,) = packed(examples.heldout[:1], tokenizer, length=10_000, limit=10_000)
    tokens = batch.input_ids[0].tolist()
    assert tokenizer.bos_token_id not in tokens
    assert tokenizer.decode(tokens) == examples.heldout[0] + "<eos>"


def test_responses_are_padded_on_the_right_and_only_their_tokens_are_targets():
    pairs = [Pair("a ", "b c", "d"), Pair("e f ", "g", "h h")]
    ((chosen, rejected),) = responses(pairs, words(), length=10)
    assert chosen.input_ids.tolist() == [[2, 3, 4, 1], [6, 7, 8, 1]]
    assert rows(chosen) == [([2, 3, 4, 1], [1, 2, 3]), ([6, 7, 8, 1], [2, 3])]
    assert rejected.input_ids.tolist() == [[2, 5, 1, 0, 0], [6, 7, 9, 9, 1]]
    assert rows(rejected) == [([2, 5, 1], [1, 2]), ([6, 7, 9, 9, 1], [2, 3, 4])]


def test_the_prompt_ends_where_the_tokens_of_both_wholes_leave_it():
    # "x y" is one token where "y" follows: the prompt's last token is then the response's.
    backend = Tokenizer(models.BPE({"x": 0, "y": 1, "z": 2, "xy": 3, "<eos>": 4}, [("x", "y")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenize(Pair("zx", "y", "z"), tokenizer) == ([2], [3, 4], [0, 2, 4])


def test_a_response_that_closes_itself_is_not_closed_twice():
    assert tokenize(Pair("a ", "b <eos>", "c"), words()) == ([2], [3, 1], [4, 1])


@pytest.fixture(params=["world", "bpe", "bpe with a beginning"])
def any_tokenizer(request, tokenizer, examples):
    return tokenizer if request.param == "world" else bpe(examples.text, begins="beginning" in request.param)


def test_string_pairs_are_tokenized_as_trl_tokenizes_them(any_tokenizer, examples):
    # Also without the space at the prompt's end, where BPE merges differently, and with a shared start.
    pairs = [
        *examples.pairs,
        *(Pair(str(p.prompt).rstrip(), f" {p.chosen}", f" {p.rejected}") for p in examples.pairs),
        Pair("question : a", "nswer one", "nswer two"),
        Pair("", "it seems", "of course"),
    ]
    assert [tokenize(pair, any_tokenizer) for pair in pairs] == trl_tokens(pairs, any_tokenizer)


@pytest.mark.parametrize("begins", [False, True])
def test_conversations_are_tokenized_as_trl_tokenizes_them(examples, begins):
    tokenizer = bpe(examples.text, begins=begins)
    tokenizer.chat_template = TEMPLATE
    pairs = [conversation(pair) for pair in examples.pairs]
    ours = [tokenize(pair, tokenizer) for pair in pairs]
    # As messages, where TRL applies the template itself, and as the strings that they are trained on.
    assert ours == trl_tokens(pairs, tokenizer)
    assert ours == trl_tokens([render(pair, tokenizer) for pair in pairs], tokenizer)
    beginning, end = tokenizer.get_vocab()["<bos>"], tokenizer.get_vocab()["<eos>"]
    for prompt, chosen, rejected in (tokenize(pair, tokenizer) for pair in pairs):
        assert prompt[0] == beginning and (prompt + chosen + rejected).count(beginning) == 1
        assert chosen[-1] == rejected[-1] == end and end not in (chosen[-2], rejected[-2])


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_conversations_of_every_family_are_tokenized_as_trl_tokenizes_them(examples, template, begins):
    tokenizer = bpe(examples.text, begins=begins)
    tokenizer.chat_template = TEMPLATES[template]
    pairs = [conversation(pair) for pair in examples.pairs[:12]]
    turns: Any = [*pairs[0].prompt, *pairs[0].chosen, *pairs[1].prompt]
    pairs.append(Pair(turns, pairs[1].chosen, pairs[1].rejected))
    tokens = tokenized(pairs, tokenizer)
    assert tokens == trl_tokens(pairs, tokenizer)
    ends, begin = tokenizer.get_vocab()["<eos>"], tokenizer.get_vocab()["<bos>"]
    for prompt, chosen, _ in tokens:
        assert chosen.count(ends) == (template != "gemma") and prompt[1:].count(begin) == 0


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_single_responses_are_tokenized_as_trls_other_trainers_tokenize_them(examples, template):
    tokenizer = bpe(examples.text, begins=True)
    tokenizer.chat_template = TEMPLATES.get(template)
    pairs = [pair if template is None else conversation(pair) for pair in examples.pairs[:12]]
    ours = tokenized_responses(pairs, tokenizer)
    columns = {"prompt": [pair.prompt for pair in pairs] * 2}
    columns["completion"] = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tokens = [(ids[:start], ids[start:]) for ids, start, _, _ in ours]
    tokens += [(ids[:start], ids[start:]) for _, _, ids, start in ours]
    kto = trl_rows(KTOTrainer, {**columns, "label": [True] * 12 + [False] * 12}, tokenizer)
    assert tokens == [(row["prompt_ids"], row["completion_ids"]) for row in kto]
    sft = trl_rows(SFTTrainer, columns, tokenizer)
    assert [prompt + response for prompt, response in tokens] == [row["input_ids"] for row in sft]
    assert [[-100] * len(prompt) + response for prompt, response in tokens] == [row["labels"] for row in sft]


def test_documents_that_are_closed_are_not_closed_again():
    (batch,) = packed(["a <eos>", "b"], words(), length=4, limit=100)
    assert batch.input_ids.tolist() == [[2, 1, 3, 1]]
    (batch,) = packed(["a", "b"], words(), length=4, limit=100, closed=True)
    assert batch.input_ids.tolist() == [[2, 3]]


def test_conversations_without_a_template_are_tokenized_as_trl_tokenizes_their_strings(examples):
    tokenizer = bpe(examples.text, begins=True)
    pairs = [conversation(pair) for pair in examples.pairs]
    strings = [render(pair, tokenizer) for pair in pairs]
    assert [tokenize(pair, tokenizer) for pair in pairs] == trl_tokens(strings, tokenizer)


@pytest.mark.parametrize("length", [9, 14, 20])
def test_over_long_prompts_are_left_out_as_trl_leaves_them_out(any_tokenizer, examples, length):
    batches = list(responses(examples.pairs, any_tokenizer, length, size=4))
    kept = trl_tokens(list(examples.pairs), any_tokenizer, length)
    for side in (1, 2):
        ours = [row for batch in batches for row in rows(batch[side - 1])]
        whole = [((row[0] + row[side])[:length], len(row[0])) for row in kept]
        assert ours == [(tokens, list(range(start, len(tokens)))) for tokens, start in whole]
    if length == 9:
        assert len(kept) < len(examples.pairs)


def test_a_pair_whose_prompt_fills_the_length_is_dropped_and_a_longer_response_truncated():
    pairs = [Pair("a b c ", "d", "e"), Pair("a b ", "d e", "f")]
    ((chosen, rejected),) = responses(pairs, words(), length=3)
    assert rows(chosen) == [([2, 3, 5], [2])] and rows(rejected) == [([2, 3, 7], [2])]
    assert list(responses(pairs[:1], words(), length=3)) == []


def test_targets_never_cover_a_prompt_the_padding_or_a_first_token(any_tokenizer, examples):
    for pair_of_batches in responses(examples.pairs, any_tokenizer, length=30, size=7):
        prompts = 0
        for batch in pair_of_batches:
            assert not (batch.target & (batch.attention_mask == 0)).any()
            assert not batch.target[:, 0].any()
            prompts += int((batch.attention_mask.bool() & ~batch.target).sum())
        assert prompts > 0
    (empty, _), *_ = responses([Pair("", "it seems", "of course")], any_tokenizer, length=30)
    assert empty.target[0, :1].tolist() == [False]


def test_answers_follow_their_questions_and_only_their_tokens_are_targets():
    questions = [Question("a b", " c"), Question("d", " e f g"), Question("h", " a")]
    first, second = answers(questions, words(), size=2)
    # No end token behind the answer, which need not end a text.
    assert rows(first) == [([2, 3, 4], [2]), ([5, 6, 7, 8], [1, 2, 3])]
    assert first.input_ids.tolist() == [[2, 3, 4, 0], [5, 6, 7, 8]]
    assert rows(second) == [([9, 2], [1])]
    assert list(answers([], words())) == []


def test_an_answer_starts_where_its_tokens_leave_the_question():
    # "x y" is one token where "y" follows: the question's last token is then the answer's.
    backend = Tokenizer(models.BPE({"x": 0, "y": 1, "z": 2, "xy": 3, "<eos>": 4}, [("x", "y")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    (batch,) = answers([Question("zx", "y")], tokenizer)
    assert rows(batch) == [([2, 3], [1])]


def test_a_beginning_is_put_in_front_of_a_question_and_is_no_target(examples):
    tokenizer = bpe(examples.text, begins=True)
    (batch,) = answers([Question("a question", " answered")], tokenizer)
    ((tokens, targets),) = rows(batch)
    beginning = tokenizer.get_vocab()["<bos>"]
    assert tokens[0] == beginning and tokens.count(beginning) == 1
    assert tokenizer.decode([tokens[place] for place in targets]) == " answered"


def test_a_batch_on_another_device_is_the_same_batch():
    (batch,) = packed(["a b c"], words(), length=4, limit=10)
    moved = batch.to(torch.device("cpu"))
    assert_close(moved.input_ids, batch.input_ids)
    assert batch.to(torch.device("meta")).target.device.type == "meta"


@pytest.mark.parametrize("texts", [[], [""], ["a b"]])
def test_text_of_fewer_than_two_tokens_is_refused(texts):
    message = r"the held-out text has fewer than 2 tokens: give more text with data\.heldout"
    with pytest.raises(ValueError, match=message):
        packed(texts, words(), length=4, limit=1)
