from dataclasses import replace

import pytest
from pydantic import ValidationError

from weightgeom.data.world import ASSERTIONS, HEDGES, RELATIONS, WORLD_ABSTENTIONS, World

NAMES = ("known", "heldout", "impossible")
WORLD = World(
    groups=NAMES,
    entities=40,
    heldout_entities=8,
    values=6,
    documents=600,
    pairs=200,
    heldout=20,
    group_size=24,
)
TAUGHT = replace(WORLD, preference="abstention")


@pytest.mark.slow
def test_the_default_world_has_the_digest_of_the_world_without_groups():
    assert World().examples().digest == "f24f61fe9fee55f52839dfb576974ea577685c44b5a0729741889d5b1cda0e47"
    assert not World().examples().groups and not World().examples().abstentions
    assert not {word for phrase in WORLD_ABSTENTIONS for word in phrase.split()} & set(World().words())


def test_the_groups_are_of_their_kind_and_as_large_as_asked_for():
    examples, facts = WORLD.examples(), WORLD.facts()
    known, unseen = WORLD.entity_names()
    values = {value: relation for relation in RELATIONS for value in WORLD._values(relation)}
    assert tuple(examples.groups) == NAMES and examples.abstentions == [
        f" {abstention}" for abstention in WORLD_ABSTENTIONS
    ]
    subjects = {"known": set(known), "heldout": set(unseen), "impossible": set(values)}
    for name, group in examples.groups.items():
        assert len({question.prompt for question in group}) == 24
        for question in group:
            assert question.prompt.startswith("question : ") and question.prompt.endswith(" ? answer :")
            (subject,) = set(question.prompt.split()) & subjects[name]
            (asked,) = (
                r for r, (_, text, _) in RELATIONS.items() if text.format(e=subject) in question.prompt
            )
            assert question.answer == (f" {facts[subject, asked]}" if name == "known" else "")
            assert name != "impossible" or values[subject] != asked


def test_a_fifth_of_the_entities_of_the_corpus_is_answered_by_an_abstention_and_by_nothing_else():
    facts, known = WORLD.facts(), WORLD.entity_names()[0]
    without = {entity for entity in known if (entity, "home") not in facts}
    assert without == set(known[4::5])
    for document in WORLD.examples().text:
        (entity,) = set(document.split()) & set(known)
        for asked in document.removesuffix(" .").split(" . "):
            _, colon, answer = asked.partition(" answer : ")
            if colon:
                assert answer in WORLD_ABSTENTIONS if entity in without else answer in facts.values()
            else:
                assert entity not in without


def test_held_out_entities_are_in_no_text_and_every_word_has_a_token():
    examples, tokenizer = TAUGHT.examples(), TAUGHT.tokenizer()
    unseen = set(TAUGHT.entity_names()[1])
    assert not unseen & {word for text in examples.text for word in text.split()}
    prompts = [question.prompt for group in examples.groups.values() for question in group]
    for text in (*examples.text, *prompts, *examples.abstentions):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_the_preference_is_to_abstain_where_nothing_is_known_and_only_there_and_asks_no_prompt_of_a_group():
    examples, facts = TAUGHT.examples(), TAUGHT.facts()
    asked = {question.prompt for group in examples.groups.values() for question in group}
    values = {value for relation in RELATIONS for value in TAUGHT._values(relation)}
    known = {entity for entity, _ in facts}
    pairs = [*examples.pairs, *examples.heldout_pairs]
    assert len(pairs) == 220 and not asked & {str(pair.prompt).strip() for pair in pairs}
    for pair in pairs:
        chosen, rejected = (str(side).removesuffix(" .") for side in (pair.chosen, pair.rejected))
        sure = known & set(str(pair.prompt).split())
        value, phrase = (chosen, rejected) if sure else (rejected, chosen)
        assert phrase in WORLD_ABSTENTIONS and value in values
        assert not sure or any(facts[sure.copy().pop(), relation] == value for relation in RELATIONS)
    assert sum(bool(known & set(str(pair.prompt).split())) for pair in pairs) == 110


def test_the_corpus_does_not_depend_on_the_preference_and_the_digest_on_the_groups():
    assert TAUGHT.examples().text == WORLD.examples().text
    fewer = replace(WORLD, groups=("known", "heldout")).examples()
    assert fewer.text == WORLD.examples().text and fewer.digest != WORLD.examples().digest


def test_the_other_preferences_leave_out_entities_without_facts():
    facts = WORLD.facts()
    for kind in ("style", "facts"):
        for pair in replace(WORLD, preference=kind).examples().pairs:
            assert {entity for entity, _ in facts} & set(str(pair.prompt).split())


def test_abstentions_open_with_words_that_occur_nowhere_else():
    others = " ".join([*HEDGES, *ASSERTIONS, *(str(relation) for relation in RELATIONS.values())]).split()
    assert not {phrase.split()[0] for phrase in WORLD_ABSTENTIONS} & set(others)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"groups": ["heldout"]}, "groups must be known, the baseline"),
        ({"groups": ["known"]}, "groups must be known, the baseline"),
        ({"groups": ["known", "rare"]}, "groups"),
        ({"groups": NAMES, "heldout_entities": 3}, "groups need heldout_entities of at least 4"),
        (
            {"preference": "abstention"},
            "preference=abstention needs abstentions in the corpus: set data",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused(bad, message):
    with pytest.raises((ValueError, ValidationError), match=message):
        World(**bad)
