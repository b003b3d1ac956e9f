import logging
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template, extract_prompt

from weightgeom.text.conversation import (
    CHAT_TEMPLATE,
    checked_text,
    for_trl,
    is_complete,
    plain_text,
    render,
    with_shared_prompt,
)
from weightgeom.text.examples import Pair

MESSAGES = [
    {"role": "system", "content": "Be 'brief'."},
    {"role": "user", "content": "  Hi {{ there }}\n"},
    {"role": "assistant", "content": "Hello.\n\nWell?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye, <b>you</b>. "},
]
PLAIN = (
    "\n\nSystem: Be 'brief'.\n\nHuman:   Hi {{ there }}\n\n\nAssistant: Hello.\n\nWell?"
    "\n\nHuman: Bye\n\nAssistant: Bye, <b>you</b>. "
)
PAIR = Pair(MESSAGES[:4], MESSAGES[4:], [{"role": "assistant", "content": "Bye, me."}])
# writes an empty thought before the last answer, and only there: the prompt alone cannot know
THINKING = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def test_a_conversation_is_rendered_as_plain_text_and_a_string_unchanged():
    assert plain_text(MESSAGES) == PLAIN
    assert plain_text(PLAIN) == PLAIN


def test_the_chat_template_renders_the_same_text_as_plain_text(tokenizer):
    def rendered(messages, **options):
        return tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False, **options)

    assert rendered(MESSAGES) == PLAIN
    assert rendered(MESSAGES[:2]) == plain_text(MESSAGES[:2])
    assert rendered(MESSAGES[:4], add_generation_prompt=True) == plain_text(MESSAGES[:4]) + ("\n\nAssistant:")


def test_without_a_template_the_pair_is_rendered_plainly_and_the_log_says_so_once(tokenizer, caplog):
    tokenizer.name_or_path = "bare"
    with caplog.at_level(logging.INFO):
        pairs = [render(PAIR, tokenizer) for _ in range(2)]
    prompt = plain_text(MESSAGES[:4]) + "\n\nAssistant:"
    assert pairs == [Pair(prompt, " Bye, <b>you</b>. ", " Bye, me.")] * 2
    assert plain_text(pairs[0].prompt) + plain_text(pairs[0].chosen) == PLAIN
    assert caplog.text.count("bare has no chat template") == 1
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING])
def test_prompt_plus_response_is_the_whole_rendering_as_in_trl(tokenizer, template):
    tokenizer.chat_template = template
    pair = render(PAIR, tokenizer)
    generating = tokenizer.apply_chat_template(MESSAGES[:4], tokenize=False, add_generation_prompt=True)
    assert pair.prompt == generating
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert plain_text(pair.prompt) + plain_text(pair.chosen) == whole
    sides: Any = {"prompt": PAIR.prompt, "chosen": PAIR.chosen, "rejected": PAIR.rejected}
    assert pair == Pair(**apply_chat_template(sides, tokenizer))


def test_a_prompt_that_ends_in_an_answer_has_no_header_at_its_end(tokenizer):
    reply, other = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    pair = render(Pair(MESSAGES[:3], reply, other), tokenizer)
    assert pair == Pair(plain_text(MESSAGES[:3]), "\n\nHuman: a", "\n\nHuman: b")


def test_text_rendered_only_with_a_response_belongs_to_the_response(tokenizer):
    tokenizer.chat_template = THINKING
    assert render(PAIR, tokenizer).chosen == "<think></think>Bye, <b>you</b>. <end>"


def test_text_rendered_only_without_a_response_is_omitted(tokenizer):
    tokenizer.chat_template = THINKING.replace("<think></think>", "").replace(
        "%}<assistant>{%", "%}<assistant><think>{%"
    )
    pair = render(PAIR, tokenizer)
    assert plain_text(pair.prompt).endswith("<user>Bye<end><assistant>")
    assert (pair.chosen, pair.rejected) == ("Bye, <b>you</b>. <end>", "Bye, me.<end>")


def test_trl_gets_messages_if_the_tokenizer_has_a_template_and_else_plain_text(tokenizer):
    assert for_trl([PAIR], tokenizer) == [render(PAIR, tokenizer)]
    tokenizer.chat_template = THINKING
    assert for_trl([PAIR], tokenizer) == [PAIR]
    assert for_trl([Pair("q", "a", "b")], tokenizer) == [Pair("q", "a", "b")]
    with pytest.raises(ValueError, match="1 of 2 pairs are conversations and the others strings"):
        for_trl([PAIR, Pair("q", "a", "b")], tokenizer)


def test_a_pair_of_strings_is_rendered_already(tokenizer):
    pair = Pair("q", "a", "b")
    assert render(pair, tokenizer) is pair


def trl_pair(sides: Any) -> Pair:
    extracted: Any = extract_prompt(sides)
    return Pair(**extracted)


def test_the_implicit_prompt_is_the_one_that_trl_extracts():
    strings: Any = {"chosen": "Q: why? A: since so", "rejected": "Q: why? A: because"}
    assert with_shared_prompt(**strings) == trl_pair(strings)
    assert with_shared_prompt(**strings) == Pair("Q: why? A:", " since so", " because")
    longer: Any = {"chosen": MESSAGES, "rejected": [*MESSAGES[:4], *PAIR.rejected]}
    assert with_shared_prompt(**longer) == trl_pair(longer) == PAIR


def test_the_implicit_prompt_of_a_plain_dialogue_ends_at_the_last_header_and_not_within_the_response():
    start = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: why?\n\nAssistant:"
    pair = with_shared_prompt(f"{start} Well, one", f"{start} Well, other")
    assert pair == Pair(start, " Well, one", " Well, other")


def test_texts_that_share_nothing_have_an_empty_prompt():
    # TRL's function gives "Yes" as the prompt of the first and fails on the second
    assert with_shared_prompt("Yes ", "No") == Pair("", "Yes ", "No")
    assert with_shared_prompt("", "No") == Pair("", "", "No")
    assert with_shared_prompt([], MESSAGES) == Pair([], [], MESSAGES)


def test_a_pair_is_complete_if_its_prompt_and_both_assistants_say_something():
    assert is_complete(PAIR) and is_complete(Pair("q", "a", "b"))
    for pair in (
        Pair("", "a", "b"),
        Pair("q", " \n", "b"),
        Pair("q", "a", ""),
        Pair([], PAIR.chosen, PAIR.rejected),
        Pair(PAIR.prompt, [{"role": "user", "content": "a"}], PAIR.rejected),
        Pair(PAIR.prompt, PAIR.chosen, [{"role": "assistant", "content": " "}]),
    ):
        assert not is_complete(pair)


def test_a_checked_conversation_keeps_roles_and_contents_only():
    assert checked_text([{**MESSAGES[0], "name": None}], "here") == MESSAGES[:1]
    assert checked_text("text", "here") == "text"


def test_malformed_conversations_are_refused():
    with pytest.raises(ValueError, match="here must be a string or a list of messages, got 7"):
        checked_text(7, "here")
    message = r"here needs messages with a role \(system, user, assistant\) and a string content, got"
    for bad in ("text", {"role": "user"}, {"role": "bot", "content": ""}):
        with pytest.raises(ValueError, match=message):
            checked_text([bad], "here")
