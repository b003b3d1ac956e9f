"""Readers of users' files (plain text, JSON lines, parquet), whose errors name the file and the line.

A missing file raises FileNotFoundError; any other defect of a file raises ValueError.
"""

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
RECORDS = (".jsonl", ".json", ".ndjson", ".parquet")


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


def place(path: Path, number: int) -> str:
    """The name of a record in errors: `FILE line 17`, or `FILE row 17` in a parquet file."""
    return f"{path} {'row' if _kind(path) == '.parquet' else 'line'} {number}"


def field(record: dict, name: str, where: str) -> Any:
    """The value of a required field; `where` names the record, as returned by `place`."""
    if name not in record:
        raise ValueError(f"{where} has no field {name!r}; its fields are {', '.join(record)}")
    return record[name]


def read_records(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Records of a JSON lines (optionally gzipped) or parquet file with their line or row number, from 1."""
    path, number = _existing(Path(path)), 0
    if _kind(path) not in RECORDS:
        raise ValueError(f"{path} must be a .jsonl, .jsonl.gz or .parquet file to hold records")
    for number, record in _parquet_records(path) if _kind(path) == ".parquet" else _json_lines(path):
        yield number, record
    if not number:
        raise ValueError(f"{path} is empty: it contains no record")


def read_documents(path: str | Path) -> list[str]:
    """The `text` of each record of a file, or the blocks of a plain-text file, separated by blank lines."""
    path = _existing(Path(path))
    if _kind(path) in RECORDS:
        documents = []
        for number, record in read_records(path):
            documents.append(text := field(record, "text", where := place(path, number)))
            if not isinstance(text, str):
                raise ValueError(f"{where} field 'text' must be a string, got {short(text)}")
    else:
        text = "".join(line for _, line in _lines(path))
        documents = [block.strip() for block in re.split(r"\n\s*\n", text)]
    if not (documents := [document for document in documents if document.strip()]):
        raise ValueError(f"{path} is empty: it contains no document")
    return documents


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
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number} is not UTF-8: {error.reason}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} line {number + 1} cannot be read: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # fails on an unpaired surrogate
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} must be a JSON object, got {short(record)}")
        yield number, record


def _parquet_records(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} row {number + 1} cannot be read: {error}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, to be quoted in a sentence."""
    return next(
        (line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
