import gzip
import json
import re
import zlib

import pyarrow
import pytest
from pyarrow import parquet

from weightgeom.text import files
from weightgeom.text.examples import Pair
from weightgeom.text.files import fingerprint, paths, read_blocks, read_records, split
from weightgeom.text.records import read_documents

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
    kind = "row" if name.endswith("parquet") else "line"
    places = [f"{folder / name} {kind} {number}" for number in (1, 2, 3)]
    assert list(read_records(folder / name)) == list(zip(places, RECORDS, strict=True))
    assert read_documents(folder / name) == ["one", "two\n\nstill two", "três"]


def test_rows_are_numbered_through_the_batches_of_a_parquet_file(folder):
    table = pyarrow.table({"n": list(range(1, 2501))})
    parquet.write_table(table, folder / "long.parquet", row_group_size=700)
    assert all(place.endswith(f"row {row['n']}") for place, row in read_records(folder / "long.parquet"))
    assert len(list(read_records(folder / "long.parquet"))) == 2500


def test_documents_of_plain_text_are_the_blocks_between_blank_lines(folder):
    text = "\ufeff \n = A = \n \n first\n  second \n\t\n\n\nlast\r\n\r\nafter\r\nwindows"
    (folder / "c.md").write_bytes(text.encode())
    expected = ["= A =", "first\n  second", "last", "after\nwindows"]
    assert read_documents(folder / "c.md") == expected
    (folder / "c.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_documents(folder / "c.txt.gz") == expected
    (folder / "mac.txt").write_bytes(b"first\rsecond\r\rlast\r")
    assert read_documents(folder / "mac.txt") == ["first\nsecond", "last"]


def test_blank_lines_of_a_jsonl_file_count_but_hold_no_record(folder):
    (folder / "gaps.jsonl").write_text('\n{"text": "x"}\n \n{"text": " "}\n')
    assert [place[-6:] for place, _ in read_records(folder / "gaps.jsonl")] == ["line 2", "line 4"]
    assert read_documents(folder / "gaps.jsonl") == ["x"]


def test_paths_takes_names_globs_and_lists_and_gives_no_file_twice(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert [path.name for path in paths("*.txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in paths(["b.txt", "*.txt", "~/a.txt"])] == ["b.txt", "a.txt"]
    assert paths("~/a.txt") == [folder / "a.txt"]
    (folder / "b[1].txt").write_text("a name that looks like a glob\n")
    assert [path.name for path in paths("b[1].txt")] == ["b[1].txt"]


def test_an_address_is_no_file(folder):
    with pytest.raises(
        ValueError, match=r"^https://h/a\.txt is an address, and only files are read: download"
    ):
        paths(["a.txt", "https://h/a.txt"])


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


def test_records_are_not_read_from_other_kinds_of_file(folder):
    with refusal("a.txt must be a .jsonl, .json, .csv, .tsv or .parquet file to hold records"):
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


TABLE = [("7", 'red, "big" house'), ("8", "two\nlines"), ("9", "três")]


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("t.csv", 'id,text\n7,"red, ""big"" house"\n8,"two\nlines"\n9,três\n'),
        ("t.csv", '\ufeffid,text\r\n\r\n7,"red, ""big"" house"\r\n8,"two\r\nlines"\r\n,\r\n9,três'),
        ("t.csv", ',id,text\n0,7,"red, ""big"" house"\n1,8,"two\nlines"\n2,9,três\n'),  # pandas' index
        ("t.csv", 'id;text\n7;"red, ""big"" house"\n8;"two\nlines"\n9;três\n'),
        ("t.tsv", 'id\ttext\n7\t"red, ""big"" house"\n8\t"two\nlines"\n9\ttrês\n'),
    ],
)
def test_a_table_is_read_by_the_names_of_its_columns(folder, name, contents):
    (folder / name).write_bytes(contents.encode())
    (folder / f"{name}.gz").write_bytes(gzip.compress(contents.encode()))
    for file in (name, f"{name}.gz"):
        assert [tuple(row.values()) for _, row in read_records(folder / file)] == TABLE
        assert read_documents(folder / file) == [text for _, text in TABLE]


def test_a_cell_of_messages_is_a_list_in_json_or_as_python_writes_it(folder):
    messages = [{"role": "user", "content": "it's"}]
    cells = [json.dumps(messages), repr(messages)]
    rows = "".join('"{}"\n'.format(cell.replace('"', '""')) for cell in cells)
    (folder / "m.csv").write_text("chosen\n" + rows)
    assert [row["chosen"] for _, row in read_records(folder / "m.csv")] == [messages] * 2
    (folder / "n.csv").write_text("chosen\n[{no}]\n")
    with refusal("n.csv line 2 field 'chosen' begins like a list of messages, but is not JSON: '[{no}]'"):
        list(read_records(folder / "n.csv"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("id,text\n1,a\n2,b,c\n", "bad.csv line 3 has 3 columns, but line 1 names 2: put text that holds a"),
        ('id,text\n1,"a\nb"\n2\n', "bad.csv line 4 has 1 columns, but line 1 names 2"),
        ("text,text\na,b\n", "bad.csv line 1 must name every column once, got text, text"),
        ('text\n"open\n', "bad.csv line 2 cannot be read: unexpected end of data"),
        ("id,body\n1,a\n", "bad.csv line 2 has no field 'text'; its fields are id, body"),
        ("id,text\n", "bad.csv is empty: it contains no record"),
        ("", "bad.csv is empty: it contains no record"),
    ],
)
def test_a_bad_row_of_a_table_is_named(folder, contents, message):
    (folder / "bad.csv").write_text(contents)
    with refusal(message):
        read_documents(folder / "bad.csv")


def test_json_is_one_array_or_has_one_record_a_line_whatever_its_suffix(folder):
    for name, contents in (
        ("a.json", json.dumps(RECORDS, indent=1)),
        ("b.jsonl", f"\n{json.dumps(RECORDS)}\n"),
    ):
        (folder / name).write_text(contents)
        assert [record for _, record in read_records(folder / name)] == RECORDS
        assert next(read_records(folder / name))[0] == f"{folder / name} record 1"


def test_a_byte_order_mark_and_unicode_line_ends_are_read_as_json_means_them(folder):
    text = "one\u2028two\x85three"
    lines = "\ufeff" + "\r\n".join([json.dumps({"text": text}, ensure_ascii=False)] * 2)
    (folder / "u.jsonl").write_bytes(lines.encode())
    assert read_documents(folder / "u.jsonl") == [text, text]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', "bad.json line 2 is not JSON: Expecting value at column 11"),
        ('[{"text": "a"},\n 3]', "bad.json record 2 must be a JSON object, got 3"),
        ('{\n "text": "a"\n}', "bad.json line 1 is not JSON: Expecting property name"),
        ("[" * 100_000, "bad.json line 1 is not JSON: maximum recursion depth exceeded"),
        ('{"text": ' + "[" * 100_000, "bad.json line 1 is not JSON: maximum recursion depth exceeded"),
        ('{"n": ' + "1" * 5000 + "}", "bad.json line 1 is not JSON: Exceeds the limit"),
        ('{"text": "a", "n": {"m": 1, "m": 2}}', "bad.json line 1 is not JSON: the field 'm' is there twice"),
        ("nul\0l", "bad.json line 1 has a NUL byte: the file is binary, not text"),
    ],
)
def test_json_that_is_none_is_named_by_its_line(folder, contents, message):
    (folder / "bad.json").write_text(contents)
    with refusal(message):
        list(read_records(folder / "bad.json"))


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("book.xlsx", b"PK\x03\x04rest", "book.xlsx is a zip archive, such as an Excel workbook: give text"),
        ("data", b"PAR1rest", "data is a parquet file: end its name in .parquet"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "a.jsonl is compressed by gzip: end its name in .gz"),
        ("a.bin", b"words\0\1\2", "a.bin line 1 has a NUL byte: the file is binary, not text"),
        ("t.txt", b"id,text\n1,words\n", "t.txt begins with the names of columns (id,text): end its name in"),
        ("j.txt", b'{"text": "a"}\n', "j.txt begins with a JSON object: end its name in .jsonl"),
        ("j.txt", b'[\n  {"text": "a"}\n]', "j.txt begins with a JSON array: end its name in .json to read"),
        ("j.md", b'[{"text": "a"}]', "j.md begins with a JSON array: end its name in .json to read"),
    ],
)
def test_what_is_no_prose_is_not_read_as_prose(folder, name, contents, message):
    (folder / name).write_bytes(contents)
    with refusal(message):
        read_documents(folder / name)


def test_another_suffix_is_read_as_plain_text_with_a_warning(folder, caplog):
    (folder / "a.text").write_text("Text, he said.\n\nMore")
    (folder / "a.log").write_text("Text, he said.\n\nMore")
    assert read_blocks(folder / "a.text") == ["Text, he said.", "More"] and not caplog.text
    assert read_blocks(folder / "a.log") == ["Text, he said.", "More"]
    assert "a.log is read as plain text, with documents between blank lines" in caplog.text


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz"])
def test_a_file_that_expands_beyond_measure_is_not_expanded(folder, monkeypatch, name):
    monkeypatch.setattr(files, "ALLOWANCE", 2**20)
    (folder / name).write_bytes(gzip.compress(b" " * 2**23))  # 1000 times its size, in one line
    with pytest.raises(ValueError, match=rf"{name} expands to more than \d MiB, 200 times its size"):
        read_documents(folder / name)


def test_a_parquet_file_that_expands_beyond_measure_is_not_expanded(folder, monkeypatch):
    monkeypatch.setattr(files, "ALLOWANCE", 2**20)
    parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 10_000}), folder / "bomb.parquet")
    with refusal("bomb.parquet expands to more than 1 MiB, 200 times its size"):
        read_documents(folder / "bomb.parquet")
