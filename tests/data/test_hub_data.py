"""Data sets by name, downloaded by the real client from a hub on loopback."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub
import pytest

from weightgeom.text.records import document_of

PAIRS, TEXT, ODD = "lab/pairs", "lab/text", "lab/odd"
PROGRAM = """
import json, logging, sys
from weightgeom.data.hub import HubData
logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
def loaded(given):
    try:
        examples = HubData(**given).examples()
        sides = [[pair.prompt, pair.chosen, pair.rejected] for pair in examples.pairs]
        return [examples.name, examples.text, examples.heldout, sides, examples.digest]
    except (OSError, ValueError) as error: return str(error)
print(json.dumps([loaded(given) for given in json.loads(sys.argv[1])]))
"""


def loaded(home: Path, url: str, *asked: dict[str, Any], offline: bool = False) -> tuple[list[Any], str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    variables = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any], str]:
    home = tmp_path_factory.mktemp("data")
    start = "\n\nHuman: Is {} even?\n\nAssistant:"
    pairs = [{"chosen": start.format(n) + " Yes.", "rejected": start.format(n) + " No."} for n in range(40)]
    write(home / "pairs" / "train.jsonl.gz", pairs)
    write(home / "pairs" / "test.jsonl.gz", pairs[38:])
    write(home / "text" / "train.jsonl", [{"text": "" if n % 2 else f"document {n}"} for n in range(80)])
    write(home / "odd" / "train.jsonl", [{"title": "what?", "summary": "this"}])
    repositories = {
        f"datasets/{name}": {"main": home / name.partition("/")[2]} for name in (PAIRS, TEXT, ODD)
    }
    pinned = {"name": PAIRS, "pins": {PAIRS: hub.commit_of(f"datasets/{PAIRS}", "main")}}
    with hub.served(repositories) as server:
        online, log = loaded(
            home / "cache",
            server.url,
            pinned | {"number": 20},
            pinned | {"number": 20, "streaming": False},
            pinned | {"number": 21, "heldout_split": "test"},
            {"name": TEXT, "number": 10, "heldout_every": 5},
            {"name": ODD},
            {"name": "lab/none"},
            {"name": PAIRS, "split": "validation"},
        )
        offline, _ = loaded(
            home / "cache", server.url, pinned | {"number": 20, "streaming": False}, offline=True
        )
    return online, offline, log


def test_pairs_are_the_first_examples_up_to_the_number(answers):
    name, text, heldout, pairs, digest = answers[0][0]
    assert name == f"{PAIRS}@{hub.commit_of(f'datasets/{PAIRS}', 'main')}" and len(digest) == 64
    assert len(pairs) == 18 and len(heldout) == 2  # every tenth prompt of 20
    assert pairs[0] == ["\n\nHuman: Is 0 even?\n\nAssistant:", " Yes.", " No."]
    assert text[0] == "\n\nHuman: Is 0 even?\n\nAssistant: Yes."


def test_streaming_the_cache_and_the_cache_offline_give_the_same_digest(answers):
    assert answers[0][1] == answers[0][0] and answers[1][0] == answers[0][0]


def test_other_examples_have_another_digest_and_a_split_of_their_own_is_held_out(answers):
    _, _, heldout, pairs, digest = answers[0][2]
    assert len(pairs) == 21 and len(heldout) == 2 and digest != answers[0][0][-1]
    assert "38" in heldout[0] and "39" in heldout[1]


def test_empty_text_is_skipped_and_an_unpinned_data_set_is_logged(answers):
    name, text, heldout, pairs, _ = answers[0][3]
    assert name == TEXT and not pairs
    assert text == [f"document {2 * n}" for n in range(10) if n % 5 != 4]
    assert heldout == ["document 8", "document 18"]
    assert f"{TEXT} is not pinned: set data.revision=COMMIT to get the same examples again" in answers[2]
    assert f"{PAIRS} is not pinned" in answers[2]  # asked for without its pin, last


def test_unusable_data_sets_are_refused_in_one_sentence(answers):
    odd, none, split = answers[0][4:]
    assert odd.startswith(f"{ODD} row 1 has no field 'text'; its fields are ")
    assert odd.endswith("with one of completion, response, output, answer")
    assert none.startswith("cannot get the split train of lab/none from the hub or its local cache (")
    assert split.startswith(f"cannot get the split validation of {PAIRS} from the hub or its local cache (")


@pytest.mark.parametrize(
    "record, text",
    [
        ({"text": "words"}, "words"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "\n\nHuman: hi"),
        ({"prompt": "1 + 1 =", "completion": " 2"}, "1 + 1 = 2"),
    ],
)
def test_a_document_is_read_from_any_common_column_layout(record, text):
    assert document_of("row 1", record) == text


def test_a_document_that_is_not_text_is_refused():
    with pytest.raises(ValueError, match="row 1 field 'text' must be a string, got 3"):
        document_of("row 1", {"text": 3})
