import gzip
import json
import logging
import re

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from weightgeom.data.preferences import Preferences
from weightgeom.interfaces import Data
from weightgeom.text.examples import Pair


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


EXPLICIT = [{"prompt": f"Question {n}?", "chosen": " Yes.", "rejected": " No."} for n in range(1, 13)]
IMPLICIT = [
    {
        "chosen": f"\n\nHuman: Is {n} even?\n\nAssistant: Yes.",
        "rejected": f"\n\nHuman: Is {n} even?\n\nAssistant: No.",
    }
    for n in range(1, 13)
]
CONVERSATIONS = [
    {
        "chosen": [user(f"Is {n} even?"), assistant("Yes.")],
        "rejected": [user(f"Is {n} even?"), assistant("No.")],
    }
    for n in range(1, 13)
]


def write(path, records):
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.fixture
def read(tmp_path):
    """The pairs of some records behind two good ones, with the good ones left out."""

    def pairs(*records):
        train = write(tmp_path / "train.jsonl", [*EXPLICIT[:2], *records])
        heldout = write(tmp_path / "heldout.jsonl", EXPLICIT[2:3])
        return Preferences(train, heldout).examples().pairs[2:]

    return pairs


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_every_nth_prompt_is_held_out_from_any_kind_of_file(tmp_path, name):
    data = Preferences(write(tmp_path / name, EXPLICIT), heldout_every=4)
    assert isinstance(data, Data)
    examples = data.examples()
    assert examples.heldout_pairs == [Pair(f"Question {n}?", " Yes.", " No.") for n in (4, 8, 12)]
    assert examples.heldout == ["Question 4? Yes.", "Question 8? Yes.", "Question 12? Yes."]
    assert len(examples.pairs) == 9 and examples.pairs[0] == Pair("Question 1?", " Yes.", " No.")
    assert examples.text[3] == "Question 5? Yes."
    assert examples.name == name and data.files() == [tmp_path / name]


def test_without_a_prompt_field_the_prompt_is_the_common_prefix(read):
    # TRL leaves the space before the first difference to the responses
    expected = Pair("\n\nHuman: Is 1 even?\n\nAssistant:", " Yes.", " No.")
    assert read(IMPLICIT[0]) == [expected]
    assert read({"prompt": None, **IMPLICIT[0]}) == [expected]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_the_prompt_of_conversations_without_one_is_the_messages_they_share(tmp_path, name):
    examples = Preferences(write(tmp_path / name, CONVERSATIONS)).examples()
    assert examples.pairs[0] == Pair([user("Is 1 even?")], [assistant("Yes.")], [assistant("No.")])
    assert examples.text[0] == "\n\nHuman: Is 1 even?\n\nAssistant: Yes."


def test_strings_and_conversations_give_the_same_text(tmp_path):
    strings = Preferences(write(tmp_path / "a.jsonl", IMPLICIT)).examples()
    conversations = Preferences(write(tmp_path / "b.jsonl", CONVERSATIONS)).examples()
    assert strings.text == conversations.text and strings.heldout == conversations.heldout
    assert strings.digest != conversations.digest


def test_a_question_repeated_in_addition_to_whole_conversations_is_not_their_prompt(read):
    expected = Pair([user("Is 1 even?")], [assistant("Yes.")], [assistant("No.")])
    assert read({"prompt": "Is 1 even?", **CONVERSATIONS[0]}) == [expected]


def test_messages_are_reduced_to_role_and_content(read):
    extra = {"prompt": [{**user("q"), "id": 3}], "chosen": [assistant("a")]}
    assert read({**extra, "rejected": [assistant("b")]}) == [
        Pair([user("q")], [assistant("a")], [assistant("b")])
    ]


def test_all_pairs_of_one_prompt_are_on_the_same_side(tmp_path):
    records = [{**record, "chosen": f" {n}"} for record in EXPLICIT for n in range(3)]
    examples = Preferences(write(tmp_path / "pairs.jsonl", records), heldout_every=6).examples()
    assert [pair.prompt for pair in examples.heldout_pairs] == ["Question 6?"] * 3 + ["Question 12?"] * 3
    assert len(examples.pairs) == 30
    heldout = [pair.prompt for pair in examples.heldout_pairs]
    assert not [pair for pair in examples.pairs if pair.prompt in heldout]


def test_files_are_read_in_order_and_training_gives_way_to_the_heldout_file(tmp_path):
    for n, record in enumerate(EXPLICIT[:4]):
        write(tmp_path / f"part{n}.jsonl", [record])
    heldout = write(tmp_path / "heldout.parquet", [EXPLICIT[1], EXPLICIT[7]])
    data = Preferences(str(tmp_path / "part*.jsonl"), heldout)
    examples = data.examples()
    assert [pair.prompt for pair in examples.pairs] == ["Question 1?", "Question 3?", "Question 4?"]
    assert examples.heldout == ["Question 2? Yes.", "Question 8? Yes."]
    assert examples.name == "part0.jsonl, part1.jsonl, part2.jsonl, part3.jsonl"
    assert data.files()[-1] == tmp_path / "heldout.parquet"


def test_reading_twice_gives_the_same_and_one_character_another_digest(tmp_path):
    path = write(tmp_path / "pairs.jsonl", EXPLICIT)
    examples = Preferences(path).examples()
    assert Preferences(path).examples() == examples
    write(tmp_path / "pairs.jsonl", [{**EXPLICIT[0], "rejected": " No!"}, *EXPLICIT[1:]])
    assert Preferences(path).examples().digest != examples.digest


def test_pairs_without_a_preference_or_a_response_are_dropped_and_counted(read, caplog):
    header = "\n\nHuman: hi\n\nAssistant:"
    with caplog.at_level(logging.WARNING):
        assert read(
            {"prompt": "q", "chosen": "same", "rejected": "same"},
            {"chosen": header + " same", "rejected": header + " same"},
            {"prompt": "q", "chosen": "", "rejected": "no"},
            {"prompt": " ", "chosen": "a", "rejected": "b"},
            {"chosen": header, "rejected": header + " hello"},
            {"chosen": header + " hello", "rejected": header + " "},
            {"chosen": "", "rejected": "no"},
            {"chosen": "Yes ", "rejected": "No"},  # nothing shared
            {"prompt": [user("q")], "chosen": [assistant("")], "rejected": [assistant("b")]},
            {"prompt": [user("q")], "chosen": [], "rejected": [assistant("b")]},
            {"chosen": [user("q")], "rejected": [user("q"), assistant("b")]},
        ) == []  # fmt: skip
    counts = "2 with chosen equal to rejected, 9 with an empty prompt or response"
    assert f"dropped 11 of 13 pairs in {caplog.records[0].args[2]}: {counts}" in caplog.text


def test_a_file_without_any_pair_left_is_refused(tmp_path):
    path = write(tmp_path / "same.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3)
    counts = "3 with chosen equal to rejected, 0 with an empty prompt or response"
    with pytest.raises(ValueError, match=rf"none of the 3 pairs in .*same\.jsonl is usable: {counts}"):
        Preferences(path).examples()


def test_a_single_prompt_cannot_be_divided(tmp_path):
    path = write(tmp_path / "one.jsonl", EXPLICIT[:1])
    with pytest.raises(ValueError, match="nothing is left to train on"):
        Preferences(path).examples()


MIXED = "train.jsonl line 3 mixes strings and conversations: use one form for all its fields"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a"}, "train.jsonl line 3 has no field 'rejected'; its fields are chosen"),
        ({"rejected": "a", "id": 1}, "line 3 has no field 'chosen'; its fields are rejected, id"),
        ({"chosen": 1, "rejected": "a"}, "line 3 field 'chosen' must be a string or a list of"),
        ({"prompt": {}, "chosen": "a", "rejected": "b"}, "line 3 field 'prompt' must be a string"),
        (
            {"chosen": ["a"], "rejected": ["b"]},
            "line 3 field 'chosen' needs messages with a role (system, user, assistant) and a string"
            " content, got 'a'",
        ),
        ({"chosen": [user("a")], "rejected": [user(None)]}, "line 3 field 'rejected' needs"),
        ({"chosen": [{"role": ["user"], "content": ""}], "rejected": []}, "line 3 field 'chosen'"),
        ({"chosen": [{"from": "human", "value": ""}], "rejected": []}, "line 3 field 'chosen'"),
        ({"chosen": "a", "rejected": [assistant("b")]}, MIXED),
        ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, MIXED),
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, MIXED),
    ],
)
def test_a_bad_record_is_named(read, record, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(record)


def test_holding_out_every_prompt_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Preferences("pairs.jsonl", heldout_every=1)
