import gzip
import json
import logging
import re
from dataclasses import replace

import pytest
from pydantic import ValidationError

from weightgeom.data.text import TextFiles
from weightgeom.interfaces import Data


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"document {n}\nsecond line" for n in range(1, 26)))
    return path


def test_every_tenth_document_is_held_out(corpus):
    data = TextFiles(str(corpus))
    assert isinstance(data, Data)
    examples = data.examples()
    assert examples.heldout == ["document 10\nsecond line", "document 20\nsecond line"]
    assert len(examples.text) == 23 and examples.text[9] == "document 11\nsecond line"
    assert (examples.name, examples.pairs, examples.heldout_pairs) == ("corpus.txt", [], [])
    assert data.files() == [corpus]


def test_reading_twice_gives_the_same_and_one_character_another_digest(corpus):
    examples = TextFiles(str(corpus)).examples()
    assert TextFiles(str(corpus)).examples() == examples
    corpus.write_text(corpus.read_text().replace("document 7", "document 8", 1))
    assert TextFiles(str(corpus)).examples().digest != examples.digest
    assert len(examples.digest) == 64


def test_equal_documents_are_never_on_both_sides(tmp_path):
    path = tmp_path / "repeats.txt"
    path.write_text("\n\n".join(str(n % 12) for n in range(60)))
    examples = TextFiles(str(path), heldout_every=4).examples()
    assert set(examples.heldout) == {"3", "7", "11"} and len(examples.heldout) == 15
    assert len(examples.text) == 45 and not set(examples.text) & set(examples.heldout)


def test_several_files_of_different_kinds_are_read_in_order_with_their_own_heldout(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "three"}).encode()))
    (tmp_path / "valid.txt").write_text("two\n\nfour")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b*")]
    data = TextFiles(files, str(tmp_path / "valid.txt"))
    examples = data.examples()
    assert (examples.text, examples.heldout) == (["one", "three"], ["two", "four"])
    assert examples.name == "a.txt, b.jsonl.gz"
    assert [path.name for path in data.files()] == ["a.txt", "b.jsonl.gz", "valid.txt"]


def test_a_single_long_document_is_cut_into_blocks_of_200_words_and_the_log_says_so(tmp_path, caplog):
    words = [f"w{n}" for n in range(2050)]
    (tmp_path / "book.txt").write_text("\n".join(words))
    with caplog.at_level(logging.WARNING):
        examples = TextFiles(str(tmp_path / "book.txt")).examples()
    # 2050 words = ten blocks of 200 and one of 50; the tenth is held out
    assert examples.heldout == ["\n".join(words[1800:2000])]
    assert examples.text[0] == "\n".join(words[:200]) and examples.text[-1].split() == words[2000:]
    assert len(examples.text) == 10
    assert "cut 1 documents into 11 blocks of 200 words" in caplog.text


def test_a_single_short_document_gives_enough_blocks_to_hold_one_out(tmp_path):
    (tmp_path / "note.txt").write_text(" ".join(f"w{n}" for n in range(50)))
    examples = TextFiles(str(tmp_path / "note.txt")).examples()
    # 50 words // 10 = 5 words a block: ten blocks, the tenth held out
    assert examples.text[0] == "w0 w1 w2 w3 w4" and len(examples.text) == 9
    assert examples.heldout == ["w45 w46 w47 w48 w49"]


def test_the_last_of_a_few_short_documents_is_held_out_whole(tmp_path):
    (tmp_path / "few.txt").write_text("one two\n\nthree\n\nfour five")
    examples = TextFiles(str(tmp_path / "few.txt")).examples()
    assert (examples.text, examples.heldout) == (["one two", "three"], ["four five"])


def test_a_corpus_too_small_to_divide_is_refused(tmp_path, corpus):
    (tmp_path / "word.txt").write_text("word")
    with pytest.raises(ValueError, match="nothing is left to train on"):
        TextFiles(str(tmp_path / "word.txt")).examples()
    with pytest.raises(ValueError, match="nothing is left to train on"):
        TextFiles(str(corpus), str(corpus)).examples()


def test_a_missing_or_bad_heldout_file_is_refused(corpus):
    data = TextFiles(str(corpus), str(corpus.with_name("corpus.text")))
    with pytest.raises(FileNotFoundError, match=r"no file corpus\.text .*did you mean corpus\.txt"):
        data.examples()
    corpus.with_name("bad.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    with pytest.raises(ValueError, match=re.escape("bad.jsonl line 2 has no field 'text'")):
        replace(data, heldout=str(corpus.with_name("bad.jsonl"))).examples()


def test_holding_out_every_document_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        TextFiles("corpus.txt", heldout_every=1)
