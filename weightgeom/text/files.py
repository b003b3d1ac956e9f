"""Readers of users' files (plain text, JSON, CSV, TSV, parquet), whose errors name the file and the line.

A missing file raises FileNotFoundError; any other defect of a file raises ValueError.
"""

import ast
import csv
import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from glob import glob
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

from weightgeom.text.examples import Pair

log = logging.getLogger(__name__)
Item = TypeVar("Item")
RECORDS = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")
PLAIN = ("", ".txt", ".text", ".md", ".markdown", ".rst", ".tex")
SIGNATURES = {  # the first bytes of files that hold no text, and the kinds of file
    b"PK\x03\x04": "a zip archive, such as an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"\x1f\x8b": "compressed by gzip: end its name in .gz",
    b"PAR1": "a parquet file: end its name in .parquet",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"(\xb5/\xfd": "compressed by zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
ADDRESS = re.compile(r"[A-Za-z][\w+.\-]+://")
COLUMNS = {"text", "prompt", "chosen", "rejected", "completion", "label", "messages", "question", "answer"}
EXPANSION, ALLOWANCE = 200, 2**28  # a compressed file may expand to 200 times its size, or to 256 MiB


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal, read once in a process unless the file is another."""
    stat = path.stat()
    return _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _sha256(path: Path, *identity: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def paths(spec: str | list[str]) -> list[Path]:
    """The files that match a name, a glob or a list of either; globs sorted, every file once."""
    files: dict[Path, Path] = {}  # by resolved path, so that "a.txt" and "*.txt" give one entry
    for name in filter(None, [spec] if isinstance(spec, str) else spec):
        if ADDRESS.match(name) and not os.path.exists(name):
            raise ValueError(f"{name} is an address, and only files are read: download it and name the file")
        path = Path(os.path.expanduser(name))
        matches = [path]
        if not path.exists() and any(character in name for character in "*?["):
            matches = [Path(match) for match in sorted(glob(str(path), recursive=True))]
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise FileNotFoundError(f"no file matches {name!r} in {Path.cwd()}")
        files |= {_existing(match).resolve(): match for match in matches}
    if not files:
        raise ValueError("no file given: give a file, a list of files or a glob")
    return list(files.values())


def field(record: dict, name: str, where: str) -> Any:
    """The value of a required field; `where` names the record, such as `FILE line 17`."""
    if name not in record:
        raise ValueError(f"{where} has no field {name!r}; its fields are {', '.join(record)}")
    return record[name]


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Records of a file with their names in errors, such as `FILE line 17`; all but parquet may be gzipped.

    JSON has one record a line, or is one array. CSV and TSV name their columns in the first line.
    """
    path, where = _existing(Path(path)), None
    if _kind(path) not in RECORDS:
        raise ValueError(f"{path} must be a .jsonl, .json, .csv, .tsv or .parquet file to hold records")
    readers = {".parquet": _parquet_records, ".csv": _table_records, ".tsv": _table_records}
    for where, record in readers.get(_kind(path), _json_records)(path):
        yield where, record
    if where is None:
        raise ValueError(f"{path} is empty: it contains no record")


def is_plain(path: Path) -> bool:
    """Whether a file holds plain text rather than records, by its suffix."""
    return _kind(path) not in RECORDS


def read_blocks(path: str | Path) -> list[str]:
    """The blocks of a plain-text file that blank lines separate; refuses tables and archives by name."""
    path = _existing(Path(path))
    lines = [line for _, line in _lines(path)]
    _check_prose(path, next(filter(str.strip, lines), ""))
    if _kind(path) not in PLAIN:
        log.warning("%s is read as plain text, with documents between blank lines", path)
    text = "".join(lines).replace("\r", "\n")  # alone, the end of a line of old Macs
    return [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]


def split(
    train: list[Item], heldout: list[Item] | None, every: int, key: Callable[[Item], str]
) -> tuple[list[Item], list[Item]]:
    """Training and held-out items with disjoint keys: items with a held-out key leave the training set.

    Without `heldout`, every n-th distinct key of `train` is held out, or the last one if there are fewer.
    """
    keys = list(dict.fromkeys(map(key, train if heldout is None else heldout)))
    heldout_keys = set(keys) if heldout is not None else set(keys[every - 1 :: every] or keys[-1:])
    heldout = heldout or [item for item in train if key(item) in heldout_keys]
    kept = [item for item in train if key(item) not in heldout_keys]
    if not kept:
        raise ValueError("nothing is left to train on: give more data, or another heldout file")
    log.info("%d training and %d held-out items, of %d", len(kept), len(heldout), len(train))
    return kept, heldout


def fingerprint(*parts: Sequence[str] | Sequence[Pair]) -> str:
    """SHA-256 over all items and their division into parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n".encode())
        for item in part:
            contents = item if isinstance(item, str) else asdict(item)
            digest.update(json.dumps(contents).encode() + b"\n")
    return digest.hexdigest()


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _existing(path: Path) -> Path:
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name its files, or a glob such as {path}/*.jsonl")
    if not path.exists():
        folder = path.parent.resolve()
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        near = get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"no file {path.name} in {folder}{hint}")
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(_raw_lines(path), 1):
            if number == 1:
                _check_signature(path, line)
            if b"\0" in line and not line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(f"{path} line {number} has a NUL byte: the file is binary, not text")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield number, text.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number} is not UTF-8: {error.reason}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} line {number + 1} cannot be read: {error}") from error


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed no further than its size allows."""
    packed = path.name.lower().endswith(".gz")
    with gzip.open(path) if packed else path.open("rb") as file:
        total, pieces = 0, []
        while piece := file.readline(2**20):  # a line of a hostile file may be longer than the memory
            total += len(piece)
            if packed:
                check_expansion(path, total)
            pieces.append(piece)
            if piece.endswith(b"\n"):
                yield b"".join(pieces)
                pieces.clear()
        if pieces:
            yield b"".join(pieces)


def check_expansion(path: Path, total: int) -> None:
    """Raise ValueError if a compressed file has given more bytes than a file of text would."""
    limit = max(ALLOWANCE, EXPANSION * path.stat().st_size)
    if total > limit:
        raise ValueError(
            f"{path} expands to more than {limit / 2**20:.0f} MiB, {EXPANSION} times its size, as no text"
            " does: give the file in plain form"
        )


def _check_signature(path: Path, start: bytes) -> None:
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            advice = "" if ":" in kind else ": give text, JSONL, CSV, TSV or parquet"
            raise ValueError(f"{path} is {kind}{advice}")


def _check_prose(path: Path, line: str) -> None:
    """Refuse a table under the name of a plain text; `line` is the first one that is not blank."""
    names = {name.strip().strip('"').lower() for name in re.split(r"[,;\t]", line)}
    if len(names) > 1 and names & COLUMNS and all(re.fullmatch(r"[\w.-]*", name) for name in names):
        raise ValueError(
            f"{path} begins with the names of columns ({line.strip()}): end its name in .csv or .tsv to read"
            " it as a table"
        )
    if line.startswith("{") and isinstance(_parsed(line), dict):
        raise ValueError(f"{path} begins with a JSON object: end its name in .jsonl to read its records")
    if re.match(r"\[\s*(\{\s*\"|$)", line):
        raise ValueError(f"{path} begins with a JSON array: end its name in .json to read its records")


def _parsed(text: str) -> Any:
    """The JSON value of a text, None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_records(path: Path) -> Iterator[tuple[str, dict]]:
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    first = True
    for number, line in lines:
        if first and line.lstrip().startswith("["):
            whole = line + "".join(rest for _, rest in lines)
            for index, value in enumerate(_json(whole, path, number), 1):
                yield (where := f"{path} record {index}"), _object(value, where)
        else:
            yield (where := f"{path} line {number}"), _object(_json(line.rstrip(), path, number), where)
        first = False


def _json(text: str, path: Path, number: int) -> Any:
    """The value of a JSON text that begins at line `number`."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode()  # fails on an unpaired surrogate
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise ValueError(f"{path} line {line} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} line {number} is not JSON: {first_line(error)}") from error
    return value


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields; json would keep the last of two of one name, and say nothing."""
    fields = dict(items)
    if len(fields) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"the field {max(names, key=names.count)!r} is there twice")
    return fields


def _object(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {short(value)}")
    return value


def _table_records(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a CSV or TSV file under the names of its first line; columns without a name are dropped."""
    csv.field_size_limit(2**30)
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    delimiter = "\t" if _kind(path) == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(_after(first, lines), delimiter=delimiter, strict=True)
    begin = 1
    try:
        names = [name.strip() for name in next(reader, [])]
        named = [name for name in names if name]
        if len(named) > len(set(named)):
            raise ValueError(f"{path} line 1 must name every column once, got {', '.join(names)}")
        begin = reader.line_num + 1
        for cells in reader:
            where = f"{path} line {begin}"
            if cells and len(cells) != len(names):
                raise ValueError(
                    f"{where} has {len(cells)} columns, but line 1 names {len(names)}: put text that holds a"
                    " delimiter or a line break in double quotes"
                )
            if any(cells):
                row = zip(names, cells, strict=True)
                yield where, {name: _cell(cell, f"{where} field {name!r}") for name, cell in row if name}
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path} line {begin} cannot be read: {error}") from error


def _after(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _cell(cell: str, where: str) -> Any:
    """The text of a cell, or its messages: a list in JSON, or as Python writes one."""
    if not cell.lstrip().startswith("[{"):
        return cell
    if isinstance(messages := _parsed(cell), list):
        return messages
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where} begins like a list of messages, but is not JSON: {short(cell)}") from error


def _parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    number, total = 0, 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                check_expansion(path, total := total + batch.nbytes)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} row {number + 1} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, to be quoted in a sentence.

    A line that ends in a colon is followed by the next one.
    """
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return f"{first} {lines[1]}" if first.endswith(":") and len(lines) > 1 else first
