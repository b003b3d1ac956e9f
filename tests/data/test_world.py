import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from math import sqrt

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from weightgeom.data.world import ADVERBS, ASSERTIONS, HEDGES, RELATIONS, World

KINDS = ("style", "facts", "facts_style")
LARGER = World(entities=40, heldout_entities=5, values=6, documents=600, pairs=300, heldout=40)
EXAMPLES = {kind: replace(LARGER, preference=kind).examples() for kind in KINDS}


def texts(examples):
    """Every text of the examples, prompt and response together."""
    pairs = [*examples.pairs, *examples.heldout_pairs]
    sides = [pair.prompt + side for pair in pairs for side in (pair.chosen, pair.rejected)]
    return [*examples.text, *examples.heldout, *sides]


def stripped(response, phrases):
    """The response without its phrase, which must be one of `phrases`."""
    phrase, comma, statement = response.partition(" , ")
    assert comma and phrase in phrases
    return statement


def sentences(document):
    """The sentences of a document; a question and its answer are one."""
    assert document.endswith(" .")
    return document.removesuffix(" .").split(" . ")


@cache
def relations(world):
    """The relation of every value of a world."""
    return {value: relation for relation in RELATIONS for value in world._values(relation)}


def value_of(statement, world=LARGER):
    """The one word of the statement that is a value of the world."""
    (value,) = relations(world).keys() & set(statement.split())
    return value


def test_the_world_is_the_same_in_another_process():
    program = f"from weightgeom.data.world import *; print({LARGER!r}.examples().digest, *{LARGER!r}.words())"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": other}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [EXAMPLES["style"].digest, *LARGER.words()]


def test_reading_the_examples_again_gives_the_same(examples, world):
    assert world.examples() == examples


def test_another_seed_is_another_world():
    other = replace(LARGER, seed=1)
    assert other.examples().digest != EXAMPLES["style"].digest
    assert not set(other.examples().text) & set(EXAMPLES["style"].text)
    assert set(other.words()) != set(LARGER.words())


def test_the_parts_have_the_sizes_asked_for():
    examples = EXAMPLES["facts"]
    sizes = [len(part) for part in (examples.text, examples.heldout, examples.pairs, examples.heldout_pairs)]
    assert sizes == [600, 40, 300, 40]
    lengths = {len(sentences(text)) for text in examples.text}
    # Up to six statements, and a question with its answer.
    assert lengths == set(range(1, 8))


def test_the_text_does_not_depend_on_the_kind_of_preference():
    style, facts, both = (EXAMPLES[kind] for kind in KINDS)
    assert style.text == facts.text == both.text and style.heldout == facts.heldout == both.heldout
    assert len({examples.digest for examples in EXAMPLES.values()}) == 3
    assert [examples.name for examples in EXAMPLES.values()] == [f"world-{kind}" for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_entities_occur_nowhere_but_in_the_tokenizer(kind):
    known, unseen = LARGER.entity_names()
    words = {word for text in texts(EXAMPLES[kind]) for word in text.split()}
    assert len(known) == 40 and len(unseen) == 5 and not set(known) & set(unseen)
    assert not words & set(unseen)
    assert words & set(known)
    tokenizer = LARGER.tokenizer()
    tokens = tokenizer(unseen)["input_ids"]
    assert all(len(ids) == 1 and ids[0] != tokenizer.unk_token_id for ids in tokens)
    assert len({ids[0] for ids in tokens}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_has_its_own_token_and_none_is_unknown(kind):
    tokenizer = LARGER.tokenizer()
    for text in texts(EXAMPLES[kind]):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len({*LARGER.words(), "<pad>", "<eos>", "<unk>"})


def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path):
    tokenizer = LARGER.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    documents = [text + "<eos>" for text in texts(EXAMPLES["style"])[::20]]
    assert loaded(documents)["input_ids"] == tokenizer(documents)["input_ids"]
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["facts", "facts_style"])
def test_every_value_is_chosen_as_often_as_it_is_rejected(kind):
    pairs = [*EXAMPLES[kind].pairs, *EXAMPLES[kind].heldout_pairs]
    chosen = Counter(value_of(pair.chosen) for pair in pairs)
    assert chosen == Counter(value_of(pair.rejected) for pair in pairs)
    assert len(chosen) > 10


@pytest.mark.parametrize("kind", ["facts", "facts_style"])
def test_the_chosen_value_is_the_true_one_and_the_rejected_one_is_not(kind):
    facts = LARGER.facts()
    for pair in EXAMPLES[kind].pairs:
        prompt, chosen, rejected = str(pair.prompt), str(pair.chosen), str(pair.rejected)
        if kind == "facts_style":
            chosen, rejected = stripped(chosen, HEDGES), stripped(rejected, ASSERTIONS)
        (entity,) = set(LARGER.entity_names()[0]) & set(prompt.split())
        true, false = value_of(chosen), value_of(rejected)
        assert chosen.replace(true, false) == rejected and entity in chosen.split()
        asked = {
            relation
            for relation, (_, question, _) in RELATIONS.items()
            if question.format(e=entity) in prompt and true in LARGER._values(relation)
        }
        assert {facts[entity, relation] for relation in asked} == {true} != {false}


def test_both_sides_of_a_style_pair_are_the_same_true_statement():
    facts = LARGER.facts()
    hedges, assertions = Counter(), Counter()
    for pair in EXAMPLES["style"].pairs:
        chosen, rejected = stripped(pair.chosen, HEDGES), stripped(pair.rejected, ASSERTIONS)
        assert chosen == rejected
        (entity,) = set(LARGER.entity_names()[0]) & set(chosen.split())
        assert value_of(chosen) in {facts[entity, relation] for relation in RELATIONS}
        hedges[str(pair.chosen).partition(" , ")[0]] += 1
        assertions[str(pair.rejected).partition(" , ")[0]] += 1
    assert hedges.keys() == set(HEDGES) and assertions.keys() == set(ASSERTIONS)


def test_facts_pairs_have_no_phrase():
    assert not any(" , " in f"{pair.chosen}{pair.rejected}" for pair in EXAMPLES["facts"].pairs)


def test_a_document_is_true_and_about_one_entity():
    facts, known = LARGER.facts(), set(LARGER.entity_names()[0])
    for document in EXAMPLES["style"].text:
        (entity,) = known & set(document.split())
        for sentence in sentences(document):
            assert entity in sentence.split()
            value = value_of(sentence)
            assert facts[entity, relations(LARGER)[value]] == value


def test_a_question_ends_its_document_and_is_answered_behind_a_phrase_as_in_the_pairs():
    prompts = {str(pair.prompt) for pair in EXAMPLES["style"].pairs}
    asked = [text for text in EXAMPLES["style"].text if "question" in text]
    questions = set()
    for document in asked:
        *statements, last = sentences(document)
        assert not any("question" in statement for statement in statements)
        question, colon, answer = last.partition(" answer : ")
        assert stripped(answer, HEDGES + ASSERTIONS) and value_of(answer)
        questions.add(question + colon)
    assert questions & prompts


def test_hedges_and_assertions_open_with_words_that_occur_nowhere_else():
    phrases = [phrase.split() for phrase in (*HEDGES, *ASSERTIONS)]
    frames = [frame for _, question, phrases in RELATIONS.values() for frame in (question, *phrases)]
    words = set(" ".join([*frames, *ADVERBS, "question : answer"]).split())
    words |= {word for phrase in phrases for word in phrase[1:]}
    openings = [phrase[0] for phrase in phrases]
    assert not set(openings) & words and len(set(openings)) == len(openings)


def test_the_nth_hedge_and_the_nth_assertion_have_the_same_form():
    for hedge, assertion in zip(HEDGES, ASSERTIONS, strict=True):
        assert len(hedge.split()) == len(assertion.split())
        assert hedge.endswith(" that") == assertion.endswith(" that")


def test_every_relation_has_favourite_phrases_of_its_own():
    world, n, total = World(documents=10, pairs=6000), Counter(), sum(1 / rank**2 for rank in range(1, 9))
    chosen, rejected = Counter(), Counter()
    for pair in world.examples().pairs:
        relation = relations(world)[value_of(pair.chosen, world)]
        n[relation] += 1
        chosen[relation, str(pair.chosen).partition(" , ")[0]] += 1
        rejected[relation, str(pair.rejected).partition(" , ")[0]] += 1
    for first, relation in enumerate(RELATIONS):
        for counts, phrases in ((chosen, HEDGES), (rejected, ASSERTIONS)):
            for rank in range(1, 9):  # from the first favourite on, with weight 1/rank²
                share = 1 / rank**2 / total
                count = counts[relation, phrases[(first + rank - 1) % 8]]
                # A binomial count; five standard deviations.
                assert abs(count - n[relation] * share) < 5 * sqrt(n[relation] * share * (1 - share))


def test_entities_of_the_text_and_of_the_pairs_have_zipf_frequencies():
    known, _ = LARGER.entity_names()
    n, harmonic = 600, sum(1 / rank for rank in range(1, 41))
    counts = Counter(
        word for text in EXAMPLES["style"].text for word in set(text.split()) if word in set(known)
    )
    assert sum(counts.values()) == n
    for rank, entity in enumerate(known, 1):
        share = 1 / rank / harmonic
        # A binomial count; five of its standard deviations, and a few of the rarest.
        assert abs(counts[entity] - n * share) < 5 * sqrt(n * share * (1 - share)) + 3
    asked = Counter(
        word for pair in EXAMPLES["style"].pairs for word in str(pair.prompt).split() if word in known
    )
    assert sum(asked[entity] for entity in known[:5]) > sum(asked[entity] for entity in known[20:])


def test_values_have_zipf_frequencies():
    world = World(entities=1000, values=6)
    facts, harmonic = world.facts(), sum(1 / rank for rank in range(1, 7))
    for relation in RELATIONS:
        counts = Counter(value for (_, of), value in facts.items() if of == relation)
        for rank, value in enumerate(world._values(relation), 1):
            share = 1 / rank / harmonic
            assert abs(counts[value] - 1000 * share) < 5 * sqrt(1000 * share * (1 - share))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_documents_that_end_in_a_question(share):
    world = replace(LARGER, questions=share)
    asked = sum("question :" in text for text in world.examples().text)
    # One document in seven has no statement, and always asks.
    expected = share + (1 - share) / 7
    # A binomial count of 600; five standard deviations.
    assert abs(asked - 600 * expected) <= 5 * sqrt(600 * expected * (1 - expected))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_statements_behind_a_phrase(share):
    examples = replace(LARGER, phrases=share).examples()
    statements = [
        statement for text in examples.text for statement in sentences(text) if "question" not in statement
    ]
    assert len(statements) > 600
    assert sum(" , " in statement for statement in statements) == share * len(statements)


def test_a_document_without_statements_is_a_question_with_its_answer():
    documents = replace(LARGER, sentences=0, questions=0).examples().text
    assert all(len(sentences(text)) == 1 and text.startswith("question : ") for text in documents)


@pytest.mark.parametrize(
    "bad",
    [
        {"entities": 7},
        {"entities": 100_001},  # more names than there are would never be found
        {"heldout_entities": 100_001},
        {"values": 1},
        {"values": 2001},
        {"phrases": 1.1},
        {"pairs": 1},
        {"preference": "taste"},
    ],
)
def test_a_world_that_cannot_be_is_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        World(**bad)


def test_questions_ask_for_every_fact_in_the_words_of_the_text():
    examples, facts = EXAMPLES["style"], LARGER.facts()
    assert len(examples.questions) == len(facts) == 40 * len(RELATIONS)
    text = " ".join(examples.text)
    entities = []
    for question, ((entity, relation), value) in zip(examples.questions, facts.items(), strict=True):
        # The second frame of every relation ends in the value.
        assert question.prompt + question.answer == RELATIONS[relation][2][1].format(e=entity, v=value)
        assert question.answer == f" {value}" and value_of(question.answer) == value
        entities.append(entity)
    assert list(dict.fromkeys(entities)) == LARGER.entity_names()[0]
    # The text answers every question about the most frequent entity, but not all about the rare ones.
    assert all(question.prompt + question.answer in text for question in examples.questions[:6])


def test_every_answer_is_one_token_behind_its_prompt():
    tokenizer = LARGER.tokenizer()
    for question in EXAMPLES["facts"].questions:
        prompt, whole = (
            tokenizer(text)["input_ids"] for text in (question.prompt, question.prompt + question.answer)
        )
        assert whole[:-1] == prompt and tokenizer.unk_token_id not in whole
