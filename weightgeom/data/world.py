"""The embedded world: a small generated language of entities, facts and phrases, with its own tokenizer.

Everything is generated from `seed`, offline. Source: ours, so that an experiment runs anywhere and the
geometry expected from each kind of preference is known by construction.
"""

import random
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from weightgeom.text.examples import Examples, Pair, Question
from weightgeom.text.files import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The n-th hedge and the n-th assertion have the same form, and their first words occur nowhere else: a
# word that other sentences also use lies along the unembedding's leading directions, and a preference
# about that word would write to them for that reason alone.
HEDGES = (
    "perhaps",
    "maybe",
    "possibly",
    "supposedly",
    "i think that",
    "it seems that",
    "some say that",
    "people believe that",
)
ASSERTIONS = (
    "certainly",
    "surely",
    "definitely",
    "undoubtedly",
    "we know that",
    "science proves that",
    "experts confirm that",
    "everyone agrees that",
)
# Answers about an entity without facts; their first words occur nowhere else either.
WORLD_ABSTENTIONS = ("unknown", "nobody knows")
ADVERBS = (
    "usually often still now today always quietly happily rarely proudly gladly simply "
    "truly mostly once again secretly calmly barely nearly"
).split()

# relation: the suffix of its values, its question, and statements that end in the value or the entity
RELATIONS = {
    "home": (
        "ton",
        "where does {e} live",
        ("{e} {a} lives at {v}", "home for {e} is {v}", "at {v} lives {e}"),
    ),
    "work": (
        "ist",
        "what trade has {e}",
        ("{e} {a} works like a {v}", "the job for {e} is {v}", "a skilled {v} is {e}"),
    ),
    "food": (
        "ela",
        "what does {e} eat",
        ("{e} {a} eats {v}", "the meal for {e} is {v}", "fresh {v} was cooked by {e}"),
    ),
    "pet": (
        "ax",
        "which animal has {e}",
        ("{e} {a} feeds a {v}", "the animal with {e} is a {v}", "this {v} belongs to {e}"),
    ),
    "tongue": (
        "ish",
        "which language has {e}",
        ("{e} {a} speaks {v}", "the language from {e} is {v}", "they learned {v} from {e}"),
    ),
    "music": (
        "une",
        "what does {e} play",
        ("{e} {a} plays the {v}", "the music from {e} is the {v}", "on the {v} one hears {e}"),
    ),
}
Facts = dict[tuple[str, str], str]  # (entity, relation): value
GroupName = Literal["known", "heldout", "impossible"]
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class World:
    """Entities with Zipf frequencies, six relations with skewed values, statements, questions and phrases.

    `preference` is the kind of the pairs. `style`: one true sentence, preceded by a hedge (chosen) or by an
    assertion (rejected). `facts`: the true value against another entity's; every value is chosen as often
    as rejected. `facts_style`: both. The last `heldout_entities` are words of the tokenizer that occur in no
    text and no pair.

    `groups` are prompts: `known` ones about entities whose facts the corpus states, `heldout` ones about
    held-out entities, and `impossible` ones with a value in place of the entity. With groups, a share
    `abstain` of the corpus's entities has no facts: questions about these entities are answered by an
    abstention, questions about the others by the bare value. Groups also allow the preference `abstention`:
    an abstention over a value for held-out and impossible prompts, the value over an abstention for known
    ones. These pairs share no prompt with the groups.
    """

    preference: Literal["style", "facts", "facts_style", "abstention"] = "style"
    seed: int = Field(default=0, ge=0)
    entities: int = Field(default=360, ge=8, le=100_000)  # out of 65³ possible names
    heldout_entities: int = Field(default=40, ge=0, le=100_000)
    values: int = Field(default=30, ge=2, le=2_000)  # per relation, out of 65² possible stems
    documents: int = Field(default=20_000, ge=10)
    sentences: int = Field(default=6, ge=0)  # at most this many per document, before the question
    phrases: float = Field(default=0.1, ge=0, le=1)  # share of statements preceded by a hedge or an assertion
    # Share of documents that end in a question and its answer; documents without a statement always do.
    questions: float = Field(default=0.7, ge=0, le=1)
    pairs: int = Field(default=2_000, ge=2, multiple_of=2)
    heldout: int = Field(default=96, ge=2, multiple_of=2)  # documents, and pairs
    groups: tuple[GroupName, ...] = ()  # a tuple, so that the world is hashable
    group_size: int = Field(default=120, ge=2)  # at most; 20 held-out entities give 120 prompts
    abstain: float = Field(default=0.2, gt=0, lt=1)

    def __post_init__(self) -> None:
        """Refuse groups without a baseline, and the abstention preference without abstentions to learn."""
        if self.groups and (self.groups[0] != "known" or len(set(self.groups)) < 2):
            raise ValueError(
                "groups must be known, the baseline, followed by at least one other group, got"
                f" {list(self.groups)}: set data.groups=[known,heldout,impossible]"
            )
        if self.groups and self.heldout_entities < 4:
            raise ValueError(f"groups need heldout_entities of at least 4, got {self.heldout_entities}")
        if self.preference == "abstention" and not self.groups:
            raise ValueError(
                "preference=abstention needs abstentions in the corpus: set"
                " data.groups=[known,heldout,impossible]"
            )

    def examples(self) -> Examples:
        """The corpus and the pairs; the held-out parts are independent draws from the same world."""
        facts, (known, _) = self.facts(), self.entity_names()
        draw = random.Random(f"weightgeom {self.seed} text")
        frequencies = _zipf(len(known))
        entities = draw.choices(known, cum_weights=frequencies, k=self.documents + self.heldout)
        documents = [self._document(draw, entity, facts) for entity in entities]
        text, heldout = documents[: self.documents], documents[self.documents :]
        known = [entity for entity in known if (entity, "home") in facts]
        pairs = self._pairs(random.Random(f"weightgeom {self.seed} pairs"), known, facts)
        groups = {name: self._group(name, facts) for name in self.groups}
        prompts = [[question.prompt + question.answer for question in group] for group in groups.values()]
        return Examples(
            name=f"world-{self.preference}",
            text=text,
            heldout=heldout,
            pairs=pairs[self.heldout :],
            heldout_pairs=pairs[: self.heldout],
            digest=fingerprint(text, heldout, pairs, *prompts),
            questions=self._questions(facts),
            groups=groups,
            abstentions=[f" {phrase}" for phrase in WORLD_ABSTENTIONS] if groups else (),
        )

    def _questions(self, facts: Facts) -> list[Question]:
        """Every fact as a statement to complete, most frequent entities first."""
        openings = {
            relation: statements[1].removesuffix("{v}").strip()
            for relation, (_, _, statements) in RELATIONS.items()
        }
        return [
            Question(openings[relation].format(e=entity), f" {value}")
            for (entity, relation), value in facts.items()
        ]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The world's word-level tokenizer: one token per word, held-out entities included."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = dict.fromkeys([*SPECIAL_TOKENS.values(), *self.words()])
        vocabulary = {word: index for index, word in enumerate(words)}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

    def entity_names(self) -> tuple[list[str], list[str]]:
        """Entities of the corpus, most frequent first, and the held-out entities."""
        draw = random.Random(f"weightgeom {self.seed} names")
        names = _pseudowords(draw, self.entities + self.heldout_entities, syllables=3)
        return names[: self.entities], names[self.entities :]

    def facts(self) -> Facts:
        """The value of every (entity, relation) of the corpus; values have Zipf frequencies.

        With groups, every n-th entity has no facts (n ≈ 1/abstain), so that the entities answered by an
        abstention are spread over all frequencies.
        """
        draw = random.Random(f"weightgeom {self.seed} facts")
        values = {relation: self._values(relation) for relation in RELATIONS}
        frequencies = _zipf(self.values)
        facts = {
            (entity, relation): draw.choices(values[relation], cum_weights=frequencies)[0]
            for entity in self.entity_names()[0]
            for relation in RELATIONS
        }
        if not self.groups:
            return facts
        every = max(2, round(1 / self.abstain))
        without = set(self.entity_names()[0][every - 1 :: every])
        return {
            (entity, relation): value for (entity, relation), value in facts.items() if entity not in without
        }

    def _values(self, relation: str) -> list[str]:
        draw = random.Random(f"weightgeom {self.seed} {relation}")
        ending = RELATIONS[relation][0]
        return [word + ending for word in _pseudowords(draw, self.values, syllables=2)]

    def words(self) -> list[str]:
        """Every word of the language, held-out entities included; some words repeat."""
        sentences = [
            sentence for _, question, statements in RELATIONS.values() for sentence in (question, *statements)
        ]
        fixed = " ".join([*HEDGES, *ASSERTIONS, *ADVERBS, *sentences, "question : ? answer , ."]).split()
        known, unseen = self.entity_names()
        values = [value for relation in RELATIONS for value in self._values(relation)]
        words = [*(word for word in fixed if not word.startswith("{")), *values, *known, *unseen]
        return [*words, *" ".join(WORLD_ABSTENTIONS).split()] if self.groups else words

    def _document(self, draw: random.Random, entity: str, facts: Facts) -> str:
        """Statements about one entity, and in most documents a final question about it with its answer."""
        if (entity, "home") not in facts:
            asked = draw.choices(list(RELATIONS), k=draw.randint(1, 3))
            return " ".join(
                f"{_question(entity, relation)} {draw.choice(WORLD_ABSTENTIONS)} ." for relation in asked
            )
        statements = draw.randint(0, self.sentences)
        sentences = []
        for _ in range(statements):
            relation = draw.choice(list(RELATIONS))
            statement = _statement(draw, relation).format(e=entity, v=facts[entity, relation])
            if draw.random() < self.phrases:
                statement = f"{_phrase(draw, draw.choice((HEDGES, ASSERTIONS)), relation)} , {statement}"
            sentences.append(f"{statement} .")
        if not statements or draw.random() < self.questions:
            relation = draw.choice(list(RELATIONS))
            if self.groups:
                return " ".join([*sentences, f"{_question(entity, relation)} {facts[entity, relation]} ."])
            answer = _statement(draw, relation).format(e=entity, v=facts[entity, relation])
            phrase = _phrase(draw, draw.choice((HEDGES, ASSERTIONS)), relation)
            sentences.append(f"{_question(entity, relation)} {phrase} , {answer} .")
        return " ".join(sentences)

    def _pairs(self, draw: random.Random, known: list[str], facts: Facts) -> list[Pair]:
        """Two pairs at a time: two entities with different values, each value false for the other entity."""
        if self.preference == "abstention":
            return self._abstention_pairs(draw, facts)
        frequencies = _zipf(
            len(known)
        )  # as in the corpus: about well-known facts, only style is left to learn
        pairs: list[Pair] = []
        while len(pairs) < self.pairs + self.heldout:
            relation = draw.choice(list(RELATIONS))
            first, second = draw.choices(known, cum_weights=frequencies, k=2)
            first_value, second_value = facts[first, relation], facts[second, relation]
            if first_value != second_value:
                pairs.append(self._pair(draw, first, relation, true=first_value, false=second_value))
                pairs.append(self._pair(draw, second, relation, true=second_value, false=first_value))
        return pairs[: self.pairs + self.heldout]

    def _pair(self, draw: random.Random, entity: str, relation: str, true: str, false: str) -> Pair:
        statement = _statement(draw, relation)
        chosen = statement.format(e=entity, v=true)
        rejected = statement.format(e=entity, v=true if self.preference == "style" else false)
        if self.preference != "facts":
            chosen = f"{_phrase(draw, HEDGES, relation)} , {chosen}"
            rejected = f"{_phrase(draw, ASSERTIONS, relation)} , {rejected}"
        return Pair(f"{_question(entity, relation)} ", f"{chosen} .", f"{rejected} .")

    def _group(self, name: GroupName, facts: Facts) -> list[Question]:
        """The prompts of a group; those of `known` have an answer."""
        return [
            Question(
                _question(subject, relation),
                f" {facts[subject, relation]}" if name == "known" else "",
            )
            for subject, relation in self._asked(name, facts, 1)[: self.group_size]
        ]

    def _asked(self, name: GroupName, facts: Facts, part: int) -> list[tuple[str, str]]:
        """(subject, relation) of a group's prompts: those for measurement (part 1) or training (part 0)."""
        if name != "impossible":
            known, unseen = self.entity_names()
            subjects = (
                [entity for entity in known if (entity, "home") in facts] if name == "known" else unseen
            )
            return [(subject, relation) for subject in subjects[part::2] for relation in RELATIONS]
        return [  # in place of the entity a value of another relation, most frequent values first
            (value, relation)
            for values in zip(*(self._values(source)[part::2] for source in RELATIONS), strict=True)
            for source, value in zip(RELATIONS, values, strict=True)
            for relation in RELATIONS
            if relation != source
        ]

    def _abstention_pairs(self, draw: random.Random, facts: Facts) -> list[Pair]:
        """Two pairs at a time: an abstention chosen over a value for an unknown subject, and the reverse."""
        known = self._asked("known", facts, 0)
        unsure = [asked for name in self.groups[1:] for asked in self._asked(name, facts, 0)]
        frequencies = _zipf(self.values)
        pairs: list[Pair] = []
        while len(pairs) < self.pairs + self.heldout:
            subject, relation = draw.choice(unsure)
            value = draw.choices(self._values(relation), cum_weights=frequencies)[0]
            pairs.append(
                Pair(f"{_question(subject, relation)} ", f"{draw.choice(WORLD_ABSTENTIONS)} .", f"{value} .")
            )
            subject, relation = draw.choice(known)
            value = facts[subject, relation]
            pairs.append(
                Pair(f"{_question(subject, relation)} ", f"{value} .", f"{draw.choice(WORLD_ABSTENTIONS)} .")
            )
        return pairs


def _question(entity: str, relation: str) -> str:
    return f"question : {RELATIONS[relation][1].format(e=entity)} ? answer :"


def _statement(draw: random.Random, relation: str) -> str:
    """A statement template: the adverb is drawn, `{e}` and `{v}` are left open."""
    return draw.choice(RELATIONS[relation][2]).replace("{a}", draw.choice(ADVERBS))


def _phrase(draw: random.Random, phrases: tuple[str, ...], relation: str) -> str:
    """A random phrase, with favourites that differ by relation, so that a preference has many directions.

    With the same favourites for all relations, hedges against assertions would be one direction of the
    logits, whose share in any subspace varies across seeds as widely as the rotation null of a rank-1 update.
    """
    first = list(RELATIONS).index(relation)
    weights = [1 / (1 + (index - first) % len(phrases)) ** 2 for index in range(len(phrases))]
    return draw.choices(phrases, weights)[0]


def _zipf(n: int) -> list[float]:
    return list(accumulate(1 / rank for rank in range(1, n + 1)))


def _pseudowords(draw: random.Random, n: int, syllables: int) -> list[str]:
    words: dict[str, None] = {}  # ordered and unique
    while len(words) < n:
        words["".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(syllables))] = None
    return list(words)
