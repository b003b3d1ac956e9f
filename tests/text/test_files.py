import gzip
import json
import re
import zlib

import pyarrow
import pytest
from pyarrow import parquet

from weightgeom.text.examples import Pair
from weightgeom.text.files import field, fingerprint, paths, place, read_documents, read_records, split

RECORDS = [{"text": "one"}, {"text": "two\n\nstill two"}, {"text": "três"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("alpha\n")
    (tmp_path / "b.txt").write_text("beta\n")
    (tmp_path / "records.jsonl").write_text(LINES)
    (tmp_path / "records.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "records.parquet")
    return tmp_path


def refusal(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz", "records.parquet"])
def test_the_three_kinds_of_file_hold_the_same_numbered_records(folder, name):
    assert list(read_records(folder / name)) == [(1, RECORDS[0]), (2, RECORDS[1]), (3, RECORDS[2])]
    assert read_documents(folder / name) == ["one", "two\n\nstill two", "três"]


def test_rows_are_numbered_through_the_batches_of_a_parquet_file(folder):
    table = pyarrow.table({"n": list(range(1, 2501))})
    parquet.write_table(table, folder / "long.parquet", row_group_size=700)
    assert all(number == row["n"] for number, row in read_records(folder / "long.parquet"))
    assert len(list(read_records(folder / "long.parquet"))) == 2500


def test_documents_of_plain_text_are_the_blocks_between_blank_lines(folder):
    text = "\ufeff \n = A = \n \n first\n  second \n\t\n\n\nlast\r\n\r\nafter\r\nwindows"
    (folder / "c.md").write_bytes(text.encode())
    expected = ["= A =", "first\n  second", "last", "after\nwindows"]
    assert read_documents(folder / "c.md") == expected
    (folder / "c.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_documents(folder / "c.txt.gz") == expected


def test_blank_lines_of_a_jsonl_file_count_but_hold_no_record(folder):
    (folder / "gaps.jsonl").write_text('\n{"text": "x"}\n \n{"text": " "}\n')
    assert [number for number, _ in read_records(folder / "gaps.jsonl")] == [2, 4]
    assert read_documents(folder / "gaps.jsonl") == ["x"]


def test_paths_takes_names_globs_and_lists_and_gives_no_file_twice(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert [path.name for path in paths("*.txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in paths(["b.txt", "*.txt", "~/a.txt"])] == ["b.txt", "a.txt"]
    assert paths("~/a.txt") == [folder / "a.txt"]
    (folder / "b[1].txt").write_text("a name that looks like a glob\n")
    assert [path.name for path in paths("b[1].txt")] == ["b[1].txt"]


def test_a_missing_file_is_named_with_the_nearest_one(folder):
    with pytest.raises(FileNotFoundError, match=r"no file records\.json in .*; did you mean rec"):
        paths("records.json")
    with pytest.raises(FileNotFoundError, match=r"no file zzz in .*[^?]$"):
        paths("zzz")
    with pytest.raises(FileNotFoundError, match=r"no file a\.txt in .*nowhere$"):
        read_documents(folder / "nowhere" / "a.txt")
    with pytest.raises(FileNotFoundError, match=re.escape("no file matches '*.csv' in ")):
        paths(["a.txt", "*.csv"])


def test_a_directory_and_nothing_at_all_are_no_files(folder):
    with refusal(f"{folder} is a directory: name its files, or a glob such as {folder}/*.jsonl"):
        paths(str(folder))
    for nothing in ("", []):
        with refusal("no file given: give a file, a list of files or a glob"):
            paths(nothing)


def test_empty_files_are_refused(folder):
    for name, contents in (("e.txt", ""), ("blank.txt", " \n\n"), ("e.jsonl", '{"text": ""}\n')):
        (folder / name).write_text(contents)
        with refusal(f"{name} is empty: it contains no document"):
            read_documents(folder / name)
    (folder / "none.jsonl").write_text("\n")
    with refusal("none.jsonl is empty: it contains no record"):
        list(read_records(folder / "none.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "bad.jsonl line 3 is not JSON: Expecting value"),
        ('["text"]', "bad.jsonl line 3 must be a JSON object, got ['text']"),
        (r'{"text": "\ud800"}', "bad.jsonl line 3 is not JSON: 'utf-8' codec can't encode"),
        ('{"txt": "x", "id": 1}', "bad.jsonl line 3 has no field 'text'; its fields are txt, id"),
        ('{"text": 7}', "bad.jsonl line 3 field 'text' must be a string, got 7"),
        ('{"text": null}', "bad.jsonl line 3 field 'text' must be a string, got None"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with refusal(message):
        read_documents(folder / "bad.jsonl")


def test_a_bad_row_of_a_parquet_file_is_named(folder):
    parquet.write_table(pyarrow.table({"text": ["a", None]}), folder / "null.parquet")
    with refusal("null.parquet row 2 field 'text' must be a string, got None"):
        read_documents(folder / "null.parquet")
    with refusal("null.parquet row 9 has no field 'chosen'; its fields are text"):
        field({"text": "a"}, "chosen", place(folder / "null.parquet", 9))


def test_records_are_not_read_from_other_kinds_of_file(folder):
    with refusal("a.txt must be a .jsonl, .jsonl.gz or .parquet file to hold records"):
        list(read_records(folder / "a.txt"))


def test_files_in_another_encoding_are_refused(folder):
    (folder / "latin.txt").write_bytes("plain\nna\xefve\n".encode("latin-1"))
    with refusal("latin.txt line 2 is not UTF-8: invalid continuation byte"):
        read_documents(folder / "latin.txt")
    (folder / "wide.jsonl").write_bytes(LINES.encode("utf-16"))
    with refusal("wide.jsonl line 1 is not UTF-8: invalid start byte"):
        read_documents(folder / "wide.jsonl")


def test_broken_gzip_files_are_refused(folder):
    (folder / "no.txt.gz").write_text("not compressed\n")
    with refusal("no.txt.gz line 1 cannot be read: Not a gzipped file"):
        read_documents(folder / "no.txt.gz")
    whole = gzip.compress("".join(f"{zlib.crc32(bytes([n]))}\n" for n in range(200)).encode())
    (folder / "cut.txt.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz line \d+ cannot be read: Compressed file"):
        read_documents(folder / "cut.txt.gz")
    (folder / "flipped.txt.gz").write_bytes(whole[:40] + bytes(200) + whole[240:])
    with pytest.raises(ValueError, match=r"flipped\.txt\.gz line \d+ cannot be read: "):
        read_documents(folder / "flipped.txt.gz")


def test_an_unreadable_parquet_file_is_refused(folder):
    (folder / "no.parquet").write_bytes(b"PAR1 is how it starts, but there is no footer")
    with refusal("no.parquet row 1 cannot be read: Parquet magic bytes not found"):
        read_documents(folder / "no.parquet")


def test_every_nth_distinct_key_is_held_out_and_no_key_is_on_both_sides():
    # distinct in order: a b c d e f; every third: c f
    train, heldout = split(list("abacdcefab"), None, 3, key=str)
    assert (train, heldout) == (list("abadeab"), list("ccf"))


def test_the_last_key_is_held_out_where_there_are_fewer_than_every():
    assert split(list("aab"), None, 10, key=str) == (["a", "a"], ["b"])


def test_training_omits_the_items_of_a_heldout_file():
    assert split(list("abcb"), list("bx"), 10, key=str) == (["a", "c"], ["b", "x"])


@pytest.mark.parametrize("heldout", [None, ["a", "b"]])
def test_nothing_left_to_train_on_is_refused(heldout):
    with refusal("nothing is left to train on: give more data, or another heldout file"):
        split(["a", "a"], heldout, 2, key=str)


def test_the_fingerprint_depends_on_the_contents_and_on_their_division():
    pair = Pair("q", "yes", "no")
    conversation = Pair([{"role": "user", "content": "q"}], "yes", "no")
    contents = (
        (["ab"], []),
        (["ac"], []),
        (["a", "b"], []),
        (["ab\n"], []),
        ([], ["ab"]),
        ([pair],),
        ([conversation],),
        ([Pair("q", "no", "yes")],),
    )
    assert len({fingerprint(*parts) for parts in contents}) == len(contents)
    # sha256 of b'1\n"ab"\n0\n'
    assert fingerprint(["ab"], []).startswith("b7594de48ebe359c")
