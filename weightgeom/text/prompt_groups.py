"""Groups of prompts, from a user's files or the hub: by how certain their answers are, or of two sorts."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

import torch

from weightgeom.text.examples import Examples, Question
from weightgeom.text.files import field, is_plain, paths, read_blocks, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)
Groups = dict[str, list[Question]]
Prompt = TypeVar("Prompt")
QUESTION_TEMPLATE = "Question: {}\nAnswer:"
ABSTENTIONS = (" I don't know", " Unknown")
POPULAR, RARE = 50_000, 100  # monthly page views of a PopQA subject: above POPULAR, or below RARE


def read_groups(spec: str | Sequence[str] | None) -> Groups:
    """Groups by name, in order of first appearance, every prompt once; empty without a `spec`.

    Each name is a JSONL, CSV, TSV or parquet file with fields `prompt`, `group` and optionally `answer`, or a
    hub data set in `HUB_READERS`, optionally with `@revision`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a record lacks these fields, a prompt is in two groups, or there is only one group.
    """
    names = [] if spec is None else [spec] if isinstance(spec, str) else list(spec)
    groups: Groups = {}
    seen: dict[str, str] = {}
    for name in names:
        dataset = name.partition("@")[0]
        for group, question in (
            HUB_READERS[dataset](name) if dataset in HUB_READERS else _file_questions(name)
        ):
            if seen.setdefault(question.prompt, group) != group:
                raise ValueError(
                    f"the prompt {short(question.prompt)} is in the groups {seen[question.prompt]!r} and"
                    f" {group!r}: keep it in one of them"
                )
            groups.setdefault(group, []).append(question)
    unique = {group: list(dict.fromkeys(questions)) for group, questions in groups.items()}
    duplicates = sum(map(len, groups.values())) - sum(map(len, unique.values()))
    if duplicates:
        log.warning("dropped %d duplicate prompts within groups", duplicates)
    if len(groups) == 1:
        raise ValueError(
            f"all prompts are in one group, {next(iter(groups))!r}: give two or more groups to compare"
        )
    return unique


def group_contents(groups: Mapping[str, Sequence[Question]]) -> list[list[str]]:
    """The parts of a fingerprint: every group's name and its prompts with their answers."""
    return [
        [name, *(question.prompt + question.answer for question in group)] for name, group in groups.items()
    ]


def equal_groups(groups: Mapping[str, Sequence[Prompt]], limit: int, seed: int) -> dict[str, list[Prompt]]:
    """The same number of prompts from every group, at most `limit`, in an order drawn from the seed."""
    size = min(limit, *map(len, groups.values()))
    if len({len(group) for group in groups.values()}) > 1 or size < max(map(len, groups.values())):
        sizes = ", ".join(f"{name} {len(group)}" for name, group in groups.items())
        log.info("using %d prompts of each group, out of %s", size, sizes)
    equal = {}
    for name, group in groups.items():
        generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
        order = torch.randperm(len(group), generator=generator).tolist()
        equal[name] = [group[index] for index in order[:size]]
    return equal


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, every one once: the field `prompt` of records, or the blocks of plain text.

    Blank lines separate the blocks. A glob is no file here: a stage is known by the content of files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a record has no text in its field `prompt`.
    """
    (path, *others) = paths(name)
    if others or path != Path(name).expanduser():
        raise FileNotFoundError(f"{name} is a glob: join its files and name the result")
    if is_plain(path):
        return list(dict.fromkeys(read_blocks(path)))
    prompts: list[str] = []
    for where, record in read_records(path):
        prompt = field(record, "prompt", where)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where} field 'prompt' must be text, got {short(prompt)}")
        prompts.append(prompt)
    return list(dict.fromkeys(prompts))


def _file_questions(name: str) -> Iterator[tuple[str, Question]]:
    for path in paths(name):
        for where, record in read_records(path):
            values = {key: field(record, key, where) for key in ("prompt", "group")}
            values["answer"] = record.get("answer") or ""
            for key, value in values.items():
                if not isinstance(value, str) or (key != "answer" and not value.strip()):
                    raise ValueError(f"{where} field {key!r} must be text, got {short(value)}")
            if set(values["group"]) & set("/@"):  # separators of groups and thresholds in tables
                raise ValueError(f"{where} field 'group' must not contain / or @, got {values['group']!r}")
            prompt, answer = values["prompt"], values["answer"]
            needs_space = answer and not prompt[-1].isspace() and not answer[0].isspace()
            yield values["group"], Question(prompt, f" {answer}" if needs_space else answer)


def _truthful_qa(name: str) -> Iterator[tuple[str, Question]]:
    for record in _hub_records(name, "validation", "generation"):
        yield "truthful_qa", Question(QUESTION_TEMPLATE.format(record["question"]), "")


def _pop_qa(name: str) -> Iterator[tuple[str, Question]]:
    """PopQA's questions about popular and about rare subjects; those in between are omitted."""
    records = _hub_records(name, "test", None)
    rows = [record for record in records if not RARE <= record["s_pop"] <= POPULAR]
    for record in sorted(rows, key=lambda record: record["s_pop"] < RARE):  # the factual group comes first
        answer = "" if record["s_pop"] < RARE else f" {json.loads(record['possible_answers'])[0]}"
        yield "popular" if answer else "rare", Question(QUESTION_TEMPLATE.format(record["question"]), answer)


def _hub_records(name: str, part: str, config: str | None) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    dataset, _, revision = name.partition("@")
    try:
        rows = load_dataset(dataset, config, split=part, revision=revision or None)
    except Exception as error:  # the hub raises many unrelated classes
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot read the hub data set {dataset}: {first}") from error
    for row in rows:
        yield dict(row)


HUB_READERS = {
    "akariasai/PopQA": _pop_qa,
    "truthful_qa": _truthful_qa,
    "truthfulqa/truthful_qa": _truthful_qa,
}


def check_groups(examples: Examples) -> None:
    """Raise ValueError if the data have fewer than two prompt groups, or no abstention phrase."""
    if len(examples.groups) < 2:
        raise ValueError(
            f"{examples.name} has no prompt groups: set data.groups, such as"
            " data.groups=[known,heldout,impossible] for data=world, or a JSONL file"
        )
    if not examples.abstentions:
        raise ValueError(f"{examples.name} has no abstention phrase: set data.abstentions")


def phrase_tokens(phrases: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of every phrase as it follows a prompt, without special tokens.

    A phrase of several tokens is scored as a whole: a model abstains if each token is the most likely one in
    turn. Gradients and logit shifts concern the next token only. Phrases of several tokens are logged.

    Raises:
        ValueError: if a phrase has no token, or an unknown one.
    """
    tokens = []
    for phrase in phrases:
        ids = list(tokenizer(phrase, add_special_tokens=False)["input_ids"])
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"the model's tokenizer has no token for the abstention {phrase!r}: choose other phrases in"
                " data.abstentions"
            )
        if len(ids) > 1:
            log.info(
                "the abstention %r has %d tokens (%s): it counts if each is the most likely one in turn",
                *(phrase, len(ids), " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))),
            )
        tokens.append(ids)
    return tokens


def first_tokens(phrases: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The distinct first tokens of the phrases, in ascending order."""
    return sorted({ids[0] for ids in phrase_tokens(phrases, tokenizer)})
