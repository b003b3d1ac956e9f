import logging
from typing import Any

import pytest

from weightgeom.text.examples import Pair
from weightgeom.text.records import documents_of, pairs_of


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}
CHAT = Pair([user("why not")], [assistant("so there")], [assistant("no idea")])


def placed(*records):
    return [(f"here line {number}", record) for number, record in enumerate(records, 1)]


def pair(**more):
    return {"chosen": "so there", "rejected": "no idea", **more}


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input"])
def test_a_prompt_under_another_name_is_the_users_message_and_the_log_names_it(name, caplog):
    caplog.set_level(logging.INFO)
    assert pairs_of(placed(pair(**{name: "why not"})), "here") == [CHAT]
    assert caplog.messages == [f"the prompts in here are {name}"]


def test_the_log_says_where_prompts_are_without_a_column_of_theirs(caplog):
    caplog.set_level(logging.INFO)
    shared = {"chosen": "why yes", "rejected": "why no", "system": ""}
    pairs_of(placed(shared), "here")
    pairs_of(placed(pair(prompt="why ")), "here")
    place = "system and the beginning that both responses share"
    assert caplog.messages == [f"the prompts in here are {place}"]


def test_a_system_message_comes_first_and_an_empty_one_not_at_all(caplog):
    caplog.set_level(logging.WARNING)
    pairs = pairs_of(
        placed(pair(system="be brief", question="why not"), pair(question="why not", system="")), "here"
    )
    prompt: Any = [SYSTEM, *CHAT.prompt]
    assert pairs == [Pair(prompt, CHAT.chosen, CHAT.rejected), CHAT]
    written = pairs_of(placed(pair(system="be brief", prompt="\n\nHuman: why not\n\nAssistant:")), "here")
    assert written == pairs[:1] and not caplog.text


def test_an_instruction_is_followed_by_its_input():
    (pairs,) = pairs_of(placed(pair(instruction="translate it", input="oui")), "here")
    assert pairs.prompt == [user("translate it\n\noui")]


def test_a_prompt_column_goes_before_its_other_names_which_are_named_in_a_warning(caplog):
    pairs = pairs_of(
        placed(pair(prompt="why ", question="what is it", notes="a b", id="x1", score=3)), "here"
    )
    assert pairs == [Pair("why ", "so there", "no idea")]
    assert "the text columns question, notes in here are not used; known names are" in caplog.text


def test_messages_that_are_not_used_are_named_in_a_warning(caplog):
    pairs_of(placed(pair(prompt="why ", messages=[user("why"), assistant("so")])), "here")
    assert "the text columns messages in here are not used" in caplog.text


@pytest.mark.parametrize(
    "value",
    [
        "今天天气怎么样？",
        {"role": "user", "content": "why not"},
        [{"from": "human", "value": "why not"}],
        ["why not"],
    ],
)
def test_text_of_any_form_in_an_unknown_column_is_named_in_a_warning(value, caplog):
    pairs_of(placed({"post": value, "chosen": "a b", "rejected": "a c", "id": ["x1"], "n": 3}), "here")
    assert "the text columns post in here are not used" in caplog.text


def test_a_string_question_belongs_to_responses_of_messages():
    record = {"question": "why not", "chosen": CHAT.chosen, "rejected": CHAT.rejected}
    assert pairs_of(placed(record), "here") == [CHAT]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q\n", "chosen": "q\nyes", "rejected": "q\nno"}, Pair("q", "\nyes", "\nno")),
        ({"prompt": "q ", "chosen": "q yes", "rejected": " q no"}, Pair("q", " yes", " no")),
        (
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("y")],
                "rejected": [user("q"), assistant("n")],
            },
            Pair([user("q")], [assistant("y")], [assistant("n")]),
        ),
        (
            {"question": "q", "chosen": "q yes", "rejected": "q no"},
            Pair([user("q")], [assistant("yes")], [assistant("no")]),
        ),
    ],
)
def test_a_prompt_that_every_response_repeats_is_removed_and_said(record, expected, caplog):
    assert pairs_of(placed(record, record), "here") == [expected] * 2
    assert "every response in here repeats its prompt: the repetitions are removed" in caplog.text


def test_a_prompt_that_most_responses_repeat_is_kept_and_said(caplog):
    caplog.set_level(logging.WARNING)
    repeats, other = (
        {"prompt": "q", "chosen": "q yes", "rejected": "q no"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    pairs = pairs_of(placed(repeats, repeats, other), "here")
    assert pairs[0] == Pair("q", "q yes", "q no")
    assert (
        "the responses of 2 of 3 pairs in here repeat their prompt, and are kept as they are" in caplog.text
    )
    caplog.clear()
    pairs_of(placed(repeats, other, other), "here")
    assert not caplog.text


def labelled(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_labelled_completions_of_one_prompt_are_paired_and_the_others_counted(caplog):
    records = placed(
        labelled("q ", "yes", True),
        labelled("r ", "yes", "True"),
        labelled("q ", "no", "false"),
        labelled("q ", "never", 0),
        labelled("q ", "maybe", "1"),
        labelled("q ", "left", 1),
    )
    assert pairs_of(records, "here") == [Pair("q ", "yes", "no"), Pair("q ", "maybe", "never")]
    assert "2 of 6 completions in here are left out" in caplog.text


def test_labelled_conversations_are_paired():
    records = placed(
        labelled([user("q")], [assistant("y")], True), labelled([user("q")], [assistant("n")], False)
    )
    assert pairs_of(records, "here") == [Pair([user("q")], [assistant("y")], [assistant("n")])]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([labelled("q", "a", "good")], "here line 1 field 'label' must be true or false, got 'good'"),
        ([{"completion": "a", "label": 1}], "here line 1 has a completion without a prompt"),
        ([labelled("q", "a", 1), labelled("r", "b", 0)], "no prompt in here has completions of both labels"),
        ([labelled("q", [assistant("a")], 1)], "here line 1 mixes strings and conversations"),
        ([pair(system=3, prompt="q")], "here line 1 field 'system' must be a string, got 3"),
        ([pair(instruction="q", input=3)], "here line 1 field 'input' must be a string, got 3"),
    ],
)
def test_a_bad_record_is_named(records, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(placed(*records), "here")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a"}, "a"),
        ({"messages": [user("q"), assistant("a")]}, "\n\nHuman: q\n\nAssistant: a"),
        ({"prompt": "q ", "completion": "a"}, "q a"),
        ({"instruction": "q", "input": "", "output": "a"}, "\n\nHuman: q\n\nAssistant: a"),
        ({"system": "s", "question": "q", "answer": "a"}, "\n\nSystem: s\n\nHuman: q\n\nAssistant: a"),
    ],
)
def test_a_document_is_the_text_of_a_record_of_any_kind(record, text, caplog):
    caplog.set_level(logging.WARNING)
    assert documents_of(placed(record), "here") == [text]
    assert not caplog.text


def test_what_documents_leave_out_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        documents_of(placed({"text": "a", "title": "two words", "id": "x"}), "here")
        documents_of(placed(labelled("q", "a", False)), "there")
    assert "the text columns title in here are not used" in caplog.text
    assert "the labels in there are not used: completions of either label are read as text" in caplog.text


def test_parts_of_messages_and_pictures_that_are_not_used_are_named_in_a_warning(caplog):
    thought = assistant("so there") | {"name": "bot", "reasoning_content": "long thoughts", "tool_calls": [1]}
    pairs_of(placed({"prompt": [user("why not")], "chosen": [thought], "rejected": CHAT.rejected}), "here")
    assert "the parts reasoning_content, tool_calls of messages in here are not used" in caplog.text
    caplog.clear()
    pairs_of(placed(pair(prompt="why not", images=["a.png"], scan=b"\0\1", id="a1")), "here")
    assert "the text columns images, scan in here are not used" in caplog.text


@pytest.mark.parametrize(
    "written",
    [
        '[{"role": "user", "content": "hi"}]',
        "[{'content': 'hi', 'role': 'user'}]\n",
        "array([{'role': 'user', 'content': 'hi'}],\n      dtype=object)",
    ],
)
def test_messages_that_were_written_as_text_are_no_text(written):
    with pytest.raises(ValueError, match="here line 1 field 'messages' is a list of messages that was writ"):
        documents_of(placed({"messages": written}), "here")
    # Text that speaks of JSON is text.
    prompt = f"{written} has a bug; which one is it?"
    assert pairs_of(placed(pair(prompt=prompt)), "here")[0].prompt == prompt
