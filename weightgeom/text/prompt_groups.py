"""Prompt groups of a user's own files or of the hub: what a model is asked, by how sure it can be."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from weightgeom.text.examples import Examples, Question
from weightgeom.text.files import field, paths, place, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)
Groups = dict[str, list[Question]]
TEMPLATE = "Question: {}\nAnswer:"
ABSTENTIONS = (" I don't know", " Unknown")
POPULAR, RARE = 50_000, 100  # views a month of a subject of PopQA: more than the one, fewer than the other


def read_groups(spec: str | Sequence[str] | None) -> Groups:
    """Groups by name in the order in which they are met, no prompt twice; none where nothing is asked for.

    Each name is a JSONL or parquet file with `prompt`, `group` and perhaps `answer`, or one of the hub's data
    sets in `HUB`, `@revision` allowed.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a record is not as above, a prompt is in two groups, or there is only one group.
    """
    names = [] if spec is None else [spec] if isinstance(spec, str) else list(spec)
    groups: Groups = {}
    seen: dict[str, str] = {}
    for name in names:
        dataset = name.partition("@")[0]
        for group, question in HUB[dataset](name) if dataset in HUB else _of_file(name):
            if seen.setdefault(question.prompt, group) != group:
                raise ValueError(
                    f"the prompt {short(question.prompt)} is in the groups {seen[question.prompt]!r} and"
                    f" {group!r}: leave it in one"
                )
            groups.setdefault(group, []).append(question)
    unique = {group: list(dict.fromkeys(questions)) for group, questions in groups.items()}
    twice = sum(map(len, groups.values())) - sum(map(len, unique.values()))
    if twice:
        log.warning("dropped %d prompts that occur twice in their group", twice)
    if len(groups) == 1:
        raise ValueError(
            f"there is one group of prompts, {next(iter(groups))!r}: give two or more to compare"
        )
    return unique


def contents(groups: Mapping[str, Sequence[Question]]) -> list[list[str]]:
    """What a fingerprint is taken of: every group's name and prompts with their answers."""
    return [
        [name, *(question.prompt + question.answer for question in group)] for name, group in groups.items()
    ]


def _of_file(name: str) -> Iterator[tuple[str, Question]]:
    for path in paths(name):
        for number, record in read_records(path):
            where = place(path, number)
            values = {key: field(record, key, where) for key in ("prompt", "group")}
            values["answer"] = record.get("answer") or ""
            for key, value in values.items():
                if not isinstance(value, str) or (key != "answer" and not value.strip()):
                    raise ValueError(f"{where} field {key!r} must be text, got {short(value)}")
            if set(values["group"]) & set("/@"):  # which in tables stand between groups and thresholds
                raise ValueError(f"{where} field 'group' must be without / and @, got {values['group']!r}")
            prompt, answer = values["prompt"], values["answer"]
            apart = answer and not prompt[-1].isspace() and not answer[0].isspace()
            yield values["group"], Question(prompt, f" {answer}" if apart else answer)


def _truthful(name: str) -> Iterator[tuple[str, Question]]:
    for record in _rows(name, "validation", "generation"):
        yield "truthful_qa", Question(TEMPLATE.format(record["question"]), "")


def _popular(name: str) -> Iterator[tuple[str, Question]]:
    """PopQA's popular subjects as `popular`, its rare ones as `rare`, those between left out."""
    rows = [record for record in _rows(name, "test", None) if not RARE <= record["s_pop"] <= POPULAR]
    for record in sorted(rows, key=lambda record: record["s_pop"] < RARE):  # the factual group comes first
        answer = "" if record["s_pop"] < RARE else f" {json.loads(record['possible_answers'])[0]}"
        yield "popular" if answer else "rare", Question(TEMPLATE.format(record["question"]), answer)


def _rows(name: str, part: str, config: str | None) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    dataset, _, revision = name.partition("@")
    try:
        rows = load_dataset(dataset, config, split=part, revision=revision or None)
    except Exception as error:  # of many kinds, all of them from the hub
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the hub's data set {dataset} cannot be read: {first}") from error
    for row in rows:
        yield dict(row)


HUB = {"akariasai/PopQA": _popular, "truthful_qa": _truthful, "truthfulqa/truthful_qa": _truthful}


def check_groups(examples: Examples) -> None:
    """Raise ValueError if the data have no groups of prompts, or no abstention phrase."""
    if len(examples.groups) < 2:
        raise ValueError(
            f"{examples.name} has no groups of prompts: give data.groups, such as"
            " data.groups=[known,heldout,impossible] on the world or a JSONL file"
        )
    if not examples.abstentions:
        raise ValueError(f"{examples.name} has no abstention phrase: give data.abstentions")


def phrase_tokens(phrases: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of every phrase as they follow a prompt, without special ones.

    A phrase that the tokenizer splits is scored as a whole, token by token: a model abstains where each of
    its tokens is the most likely one in turn. Gradients and shifts of the logits are of the next token. The
    log says which phrases are split.

    Raises:
        ValueError: if a phrase has no token, or one that the tokenizer does not know.
    """
    found = []
    for phrase in phrases:
        ids = list(tokenizer(phrase, add_special_tokens=False)["input_ids"])
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"the abstention {phrase!r} has no token of its own in this model: name another")
        if len(ids) > 1:
            log.info(
                "the abstention %r is %d tokens (%s): it counts when each is the likeliest in turn",
                *(phrase, len(ids), " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))),
            )
        found.append(ids)
    return found


def first_tokens(phrases: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The first token of every phrase, none twice."""
    return sorted({ids[0] for ids in phrase_tokens(phrases, tokenizer)})
