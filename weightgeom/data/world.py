"""The embedded world: a small generated language of entities, facts and phrases, with its own tokenizer.

Everything follows from `seed`, offline. Source: ours, so that an experiment runs anywhere and the
geometry that each preference kind should leave is known by construction.
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
# word that other sentences use too lies along the unembedding's leading directions, and a preference
# about it would write for that reason alone.
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
# What is said of an entity that nothing is known of; the first words occur nowhere else here, too.
ABSTENTIONS = ("unknown", "nobody knows")
ADVERBS = (
    "usually often still now today always quietly happily rarely proudly gladly simply "
    "truly mostly once again secretly calmly barely nearly"
).split()

# relation: the ending of its values, its question, and statements that end in the value or the entity
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
Group = Literal["known", "heldout", "impossible"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class World:
    """Entities with Zipf frequencies, six relations with skewed values, statements, questions and phrases.

    `preference` is the kind of the pairs. `style`: one true sentence behind one of the hedges (chosen)
    or of the assertions (rejected). `facts`: the true value against another entity's, every value as
    often chosen as rejected. `facts_style`: both. The last `heldout_entities` are words of the
    tokenizer that never occur in any text or pair.

    `groups` are prompts about `known` entities, whose facts the corpus tells, about `heldout` ones, and
    `impossible` ones, about values where entities belong. With them, a share `abstain` of the corpus's
    entities has no facts: what is asked about these is answered by an abstention, and what is asked about
    others by the bare value. Then there is the preference `abstention`: of an abstention over a value for
    held-out and impossible prompts, and of the value over an abstention for known ones; none of its prompts
    is one of the groups'.
    """

    preference: Literal["style", "facts", "facts_style", "abstention"] = "style"
    seed: int = Field(default=0, ge=0)
    entities: int = Field(default=360, ge=8, le=100_000)  # there are 65³ names
    heldout_entities: int = Field(default=40, ge=0, le=100_000)
    values: int = Field(default=30, ge=2, le=2_000)  # per relation; there are 65² stems
    documents: int = Field(default=20_000, ge=10)
    sentences: int = Field(default=6, ge=0)  # per document at most, before the question
    phrases: float = Field(default=0.1, ge=0, le=1)  # share of statements behind a hedge or an assertion
    # Share of documents that end in question and answer; those without a statement all do.
    questions: float = Field(default=0.7, ge=0, le=1)
    pairs: int = Field(default=2_000, ge=2, multiple_of=2)
    heldout: int = Field(default=96, ge=2, multiple_of=2)  # documents, and pairs
    groups: tuple[Group, ...] = ()  # which makes it hashable, as a list would not
    group_size: int = Field(default=120, ge=2)  # prompts a group at most; 20 held-out entities have as many
    abstain: float = Field(default=0.2, gt=0, lt=1)

    def __post_init__(self) -> None:
        """Refuse groups that nothing is compared with, and an abstention that the model cannot have."""
        if self.groups and (self.groups[0] != "known" or len(set(self.groups)) < 2):
            raise ValueError(
                f"groups must start with known, which others are compared with, got {list(self.groups)}"
            )
        if self.groups and self.heldout_entities < 4:
            raise ValueError(f"groups need 4 held-out entities or more, got {self.heldout_entities}")
        if self.preference == "abstention" and not self.groups:
            raise ValueError("preference=abstention needs abstentions in the corpus: choose groups")

    def examples(self) -> Examples:
        """The corpus and the pairs; the held-out parts are fresh draws from the same world."""
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
            abstentions=[f" {phrase}" for phrase in ABSTENTIONS] if groups else (),
        )

    def _questions(self, facts: Facts) -> list[Question]:
        """Every fact as a statement to complete, those of the most frequent entities first."""
        frames = {relation: RELATIONS[relation][2][1].removesuffix("{v}").strip() for relation in RELATIONS}
        return [
            Question(frames[relation].format(e=entity), f" {value}")
            for (entity, relation), value in facts.items()
        ]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The world's word-level tokenizer: one token a word, held-out entities included."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = dict.fromkeys([*SPECIAL.values(), *self.words()])
        vocabulary = {word: index for index, word in enumerate(words)}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)

    def entity_names(self) -> tuple[list[str], list[str]]:
        """Entities of the corpus, most frequent first, and those held out of it."""
        draw = random.Random(f"weightgeom {self.seed} names")
        names = _pseudowords(draw, self.entities + self.heldout_entities, syllables=3)
        return names[: self.entities], names[self.entities :]

    def facts(self) -> Facts:
        """The value of every (entity, relation) of the corpus; values have Zipf frequencies.

        Entities that are answered by an abstention have none: they are spread over all frequencies.
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
        return {place: value for place, value in facts.items() if place[0] not in without}

    def _values(self, relation: str) -> list[str]:
        draw = random.Random(f"weightgeom {self.seed} {relation}")
        ending = RELATIONS[relation][0]
        return [word + ending for word in _pseudowords(draw, self.values, syllables=2)]

    def words(self) -> list[str]:
        """Every word of the language, those of held-out entities included; some more than once."""
        frames = [frame for _, question, some in RELATIONS.values() for frame in (question, *some)]
        fixed = " ".join([*HEDGES, *ASSERTIONS, *ADVERBS, *frames, "question : ? answer , ."]).split()
        known, unseen = self.entity_names()
        values = [value for relation in RELATIONS for value in self._values(relation)]
        words = [*(word for word in fixed if not word.startswith("{")), *values, *known, *unseen]
        return [*words, *" ".join(ABSTENTIONS).split()] if self.groups else words

    def _document(self, draw: random.Random, entity: str, facts: Facts) -> str:
        """Statements about one entity and, mostly, a question about it with its answer, which ends it."""
        if (entity, "home") not in facts:
            asked = draw.choices(list(RELATIONS), k=draw.randint(1, 3))
            return " ".join(
                f"{_question(entity, relation)} {draw.choice(ABSTENTIONS)} ." for relation in asked
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
        """Pairs two by two: two entities that differ in a relation, each with the other's value as false."""
        if self.preference == "abstention":
            return self._abstention_pairs(draw, facts)
        frequencies = _zipf(len(known))  # those of the corpus: what is well known leaves only style to learn
        pairs: list[Pair] = []
        while len(pairs) < self.pairs + self.heldout:
            relation = draw.choice(list(RELATIONS))
            one, other = draw.choices(known, cum_weights=frequencies, k=2)
            its, others = facts[one, relation], facts[other, relation]
            if its != others:
                pairs.append(self._pair(draw, one, relation, true=its, false=others))
                pairs.append(self._pair(draw, other, relation, true=others, false=its))
        return pairs[: self.pairs + self.heldout]

    def _pair(self, draw: random.Random, entity: str, relation: str, true: str, false: str) -> Pair:
        statement = _statement(draw, relation)
        chosen = statement.format(e=entity, v=true)
        rejected = statement.format(e=entity, v=true if self.preference == "style" else false)
        if self.preference != "facts":
            chosen = f"{_phrase(draw, HEDGES, relation)} , {chosen}"
            rejected = f"{_phrase(draw, ASSERTIONS, relation)} , {rejected}"
        return Pair(f"{_question(entity, relation)} ", f"{chosen} .", f"{rejected} .")

    def _group(self, name: Group, facts: Facts) -> list[Question]:
        """The prompts of a group, each with its answer where there is one."""
        return [
            Question(
                _question(subject, relation),
                f" {facts[subject, relation]}" if name == "known" else "",
            )
            for subject, relation in self._asked(name, facts, 1)[: self.group_size]
        ]

    def _asked(self, name: Group, facts: Facts, part: int) -> list[tuple[str, str]]:
        """(subject, relation) of a group's prompts: those measured (part 1) or trained on (part 0)."""
        if name != "impossible":
            known, unseen = self.entity_names()
            subjects = [one for one in known if (one, "home") in facts] if name == "known" else unseen
            return [(subject, relation) for subject in subjects[part::2] for relation in RELATIONS]
        return [  # a value where an entity belongs, of another relation: the most frequent values first
            (value, relation)
            for values in zip(*(self._values(of)[part::2] for of in RELATIONS), strict=True)
            for of, value in zip(RELATIONS, values, strict=True)
            for relation in RELATIONS
            if relation != of
        ]

    def _abstention_pairs(self, draw: random.Random, facts: Facts) -> list[Pair]:
        """Pairs two by two: an abstention chosen over a value where nothing is known, and the reverse."""
        known = self._asked("known", facts, 0)
        unsure = [asked for name in self.groups[1:] for asked in self._asked(name, facts, 0)]
        frequencies = _zipf(self.values)
        pairs: list[Pair] = []
        while len(pairs) < self.pairs + self.heldout:
            subject, relation = draw.choice(unsure)
            value = draw.choices(self._values(relation), cum_weights=frequencies)[0]
            pairs.append(
                Pair(f"{_question(subject, relation)} ", f"{draw.choice(ABSTENTIONS)} .", f"{value} .")
            )
            subject, relation = draw.choice(known)
            value = facts[subject, relation]
            pairs.append(
                Pair(f"{_question(subject, relation)} ", f"{value} .", f"{draw.choice(ABSTENTIONS)} .")
            )
        return pairs


def _question(entity: str, relation: str) -> str:
    return f"question : {RELATIONS[relation][1].format(e=entity)} ? answer :"


def _statement(draw: random.Random, relation: str) -> str:
    """A frame with `{e}` and `{v}` open, its adverb drawn."""
    return draw.choice(RELATIONS[relation][2]).replace("{a}", draw.choice(ADVERBS))


def _phrase(draw: random.Random, phrases: tuple[str, ...], relation: str) -> str:
    """A phrase; every relation has favourites of its own, so that a preference has many directions.

    With the same favourites everywhere, hedges against assertions is one direction of the logits, and
    its share in any subspace varies with the seed as widely as the rotation null of a rank-1 update.
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
