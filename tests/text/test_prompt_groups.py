import json
import logging

import datasets
import pytest

from weightgeom.data.preferences import Preferences
from weightgeom.data.text import TextFiles
from weightgeom.text.examples import Question
from weightgeom.text.prompt_groups import read_groups

RECORDS = [
    {"prompt": "Q: one?\nA:", "group": "sure", "answer": "1"},
    {"prompt": "Q: two?\nA: ", "group": "sure", "answer": "2"},
    {"prompt": "Q: what?\nA:", "group": "unsure"},
]


@pytest.fixture
def file(tmp_path):
    def write(records, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def test_groups_are_read_in_their_order_and_an_answer_is_set_apart_from_its_prompt(file):
    groups = read_groups(file(RECORDS))
    assert groups == {
        "sure": [Question("Q: one?\nA:", " 1"), Question("Q: two?\nA: ", "2")],
        "unsure": [Question("Q: what?\nA:", "")],
    }
    assert read_groups(None) == {}


def test_a_prompt_that_occurs_twice_is_dropped_and_the_log_says_so(file, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(read_groups(file([*RECORDS, RECORDS[0]]))["sure"]) == 2
    assert "dropped 1 duplicate prompts" in caplog.text


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (RECORDS[:2], "all prompts are in one group, 'sure': give two or more"),
        (
            [*RECORDS, {**RECORDS[0], "group": "unsure"}],
            "is in the groups 'sure' and 'unsure': keep it in one",
        ),
        ([{"prompt": "a"}], "line 1 has no field 'group'"),
        ([{"prompt": " ", "group": "a"}], "line 1 field 'prompt' must be text"),
        ([{"prompt": "a", "group": 3}], "line 1 field 'group' must be text, got 3"),
    ],
)
def test_malformed_groups_are_refused(file, records, message):
    with pytest.raises(ValueError, match=message):
        read_groups(file(records))


def test_text_and_preferences_take_groups_and_their_digest_is_another(file, tmp_path):
    prompts = file(RECORDS)
    text, pairs = (
        tmp_path / "text.txt",
        file([{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(20)], "pairs.jsonl"),
    )
    text.write_text("\n\n".join(f"document {n}" for n in range(40)))
    for kind, train in ((TextFiles, str(text)), (Preferences, pairs)):
        without, grouped = (
            kind(train).examples(),
            kind(train, groups=prompts, abstentions=[" dunno"]).examples(),
        )
        assert list(grouped.groups) == ["sure", "unsure"] and grouped.abstentions == [" dunno"]
        assert not without.groups and not without.abstentions and grouped.digest != without.digest
        assert grouped.text == without.text


def test_the_hubs_data_sets_become_groups_the_factual_one_first(monkeypatch):
    popular = [
        {"question": "rare?", "s_pop": 5, "possible_answers": '["a"]'},
        {"question": "middle?", "s_pop": 1000, "possible_answers": '["b"]'},
        {"question": "popular?", "s_pop": 90_000, "possible_answers": '["c", "d"]'},
    ]
    asked = []

    def load(name, config, split, revision):
        asked.append((name, config, split, revision))
        return popular if name == "akariasai/PopQA" else [{"question": "trick?"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    groups = read_groups(["akariasai/PopQA@abc", "truthful_qa"])
    assert list(groups) == ["popular", "rare", "truthful_qa"]
    assert groups["popular"] == [Question("Question: popular?\nAnswer:", " c")]
    assert groups["rare"][0].answer == groups["truthful_qa"][0].answer == ""
    assert asked == [
        ("akariasai/PopQA", None, "test", "abc"),
        ("truthful_qa", "generation", "validation", None),
    ]


def test_an_unreadable_data_set_is_refused_in_one_sentence(monkeypatch):
    def load(*given, **named):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"cannot read the hub data set truthful_qa: no route$"):
        read_groups("truthful_qa")
