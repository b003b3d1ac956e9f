"""Files at a URL, read by ranges of bytes over HTTP or from an fsspec store, and counted."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

if TYPE_CHECKING:
    import requests

PIECE = 2**23  # bytes of one request
IN_FLIGHT = 8  # requests for the pieces of one tensor
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a request is repeated
LONGEST_WAIT = 120.0  # seconds, however long a server asks to wait
PROGRESS = 2**16  # bytes that a request must bring for the next failure to count as the first
TIMEOUT = (15.0, 60.0)  # seconds to connect, and between two arrivals of bytes
ALIGNMENT = 64  # bytes
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}  # the packages that open a store


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL: its size in bytes, and the version that the server gives.

    `version` is an ETag, a commit's blob or a time of modification, whichever there is. `etag` is compared
    with that of every answer; empty where a URL names one content for ever. `sha256` is that of the content
    where a hub states it. `of_hub` sends the hub's token along.
    """

    url: str
    size: int
    version: str
    etag: str = ""
    sha256: str = ""
    of_hub: bool = False

    def __str__(self) -> str:
        return without_secrets(self.url)

    @property
    def description(self) -> str:
        """A text that is equal for equal versions of the file and holds no secrets."""
        return json.dumps({"url": str(self), "size": self.size, "version": self.version}) + "\n"


class Traffic(NamedTuple):
    """Bytes of answers, requests, and those of them that repeated a failed one."""

    bytes: int = 0
    requests: int = 0
    repeated: int = 0

    def since(self, before: "Traffic") -> "Traffic":
        """The difference of two states."""
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


_traffic = Traffic()
_lock = threading.Lock()


def traffic() -> Traffic:
    """Everything that this process has fetched of remote checkpoints until now."""
    return _traffic


def _count(bytes: int = 0, requests: int = 0, repeated: int = 0) -> None:
    global _traffic
    with _lock:
        _traffic = Traffic(*(sum(pair) for pair in zip(_traffic, (bytes, requests, repeated), strict=True)))


def fetched(file: RemoteFile, start: int, stop: int) -> Tensor:
    """The bytes of a file from `start` to before `stop`, a uint8 tensor of that length.

    They are fetched in pieces, several at a time, and lie in memory as they do in a mapped file, modulo 64
    bytes: sums of vectorised code may depend on that.

    Raises:
        ConnectionError: if the server fails repeatedly.
        FileNotFoundError: if the file is gone.
        PermissionError: if the server refuses it.
        ValueError: if the server does not serve ranges, or the file has changed.
    """
    room = torch.empty(stop - start + ALIGNMENT, dtype=torch.uint8)
    offset = (start - room.data_ptr()) % ALIGNMENT
    content = room[offset : offset + stop - start]
    view = memoryview(content.numpy())  # pyright: ignore[reportArgumentType]
    pieces = [slice(place, min(place + PIECE, stop - start)) for place in range(0, stop - start, PIECE)]

    def fill(piece: slice) -> None:
        _fill(file, start + piece.start, view[piece])

    if len(pieces) > 1:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for _ in pool.map(fill, pieces):
                pass
    elif pieces:
        fill(pieces[0])
    return content


class Transient(Exception):
    """A failure that may be over at the next try, after `wait` seconds where the server names them."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def _fill(file: RemoteFile, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a file from `start` on; goes on behind the last byte after a failure."""
    receive = _over_http if urlsplit(file.url).scheme in ("http", "https") else _from_store
    done = failures = gained = 0
    while done < len(view):
        try:
            for count in receive(file, start + done, view[done:]):
                done += count
                gained += count
                _count(bytes=count)
            if done < len(view):
                raise Transient(f"the answer ended after {gained} bytes")
        except Transient as error:
            failures = 1 if gained >= PROGRESS else failures + 1
            gained = 0
            _wait(failures, error, str(file))


def _wait(failures: int, error: Transient, name: str) -> None:
    """Wait before the next try.

    Raises:
        ConnectionError: if there have been too many.
    """
    if failures > len(WAITS):
        raise ConnectionError(
            f"cannot read {name}: {failures} requests in a row failed, the last as {error}; check the network"
            " and start the run again, or add ++model.cache=true"
        ) from error
    _count(repeated=1)
    time.sleep(min(LONGEST_WAIT, max(WAITS[failures - 1], error.wait)))


def whole(url: str, most: int, of_hub: bool = False) -> bytes | None:
    """The content of a small file at a URL; None if there is none.

    Raises:
        ConnectionError: if the server fails repeatedly.
        ValueError: if it has more than `most` bytes.
    """
    http = urlsplit(url).scheme in ("http", "https")
    read = _http_whole if http else _store_whole
    return _tried(lambda: read(url, most, of_hub), without_secrets(url))


def probed(url: str, ranges: bool = True) -> RemoteFile | None:
    """A file at an HTTP server with its size and version, by a request for its first byte; None if missing.

    Raises:
        ConnectionError: if the server fails repeatedly.
        ValueError: if the server does not serve ranges of bytes, and `ranges` are wanted.
    """
    return _tried(lambda: _probe(url, ranges), without_secrets(url))


def listed(url: str) -> dict[str, RemoteFile]:
    """The files in a directory of a store, by name.

    Raises:
        ConnectionError: if the store fails repeatedly.
        FileNotFoundError: if there is no such directory.
        ValueError: if the package that opens the store is not installed.
    """
    entries = _tried(
        lambda: _called(url, lambda store, url: store.ls(url, detail=True)), without_secrets(url)
    )
    if not entries:
        raise FileNotFoundError(f"there is no {without_secrets(url)}: check the URL")
    files = [entry for entry in entries if entry["type"] == "file"]
    scheme = urlsplit(url).scheme
    return {
        entry["name"].rpartition("/")[2]: RemoteFile(
            f"{scheme}://{entry['name'].removeprefix(f'{scheme}://').lstrip('/')}",
            int(entry["size"]),
            _version(entry),
        )
        for entry in files
    }


def _version(entry: Mapping[str, Any]) -> str:
    keys = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    return next((str(entry[key]) for key in keys if entry.get(key)), "")


def download(file: RemoteFile, path: Path) -> None:
    """Write a remote file to `path`; goes on behind the last byte after a failure where a server allows it.

    Raises:
        ConnectionError: if the server fails repeatedly.
        OSError: if the disk is full.
        ValueError: if it has another length than it had.
    """
    http = urlsplit(file.url).scheme in ("http", "https")
    failures, gained = 0, 0
    with path.open("wb") as target:
        while target.tell() < file.size:
            before = target.tell()
            try:
                for piece in (_pieces if http else _pieces_of_store)(file, target):
                    target.write(piece)
                    _count(bytes=len(piece))
                if target.tell() != file.size:
                    raise Transient(f"it ended after {target.tell()} of {file.size} bytes")
            except Transient as error:
                gained = target.tell() - before
                failures = 1 if gained >= PROGRESS else failures + 1
                _wait(failures, error, str(file))


def _tried(work: Callable[[], Any], name: str) -> Any:
    failures = 0
    while True:
        try:
            return work()
        except FileNotFoundError:
            return None
        except Transient as error:
            failures += 1
            _wait(failures, error, name)


def without_secrets(url: str) -> str:
    """A URL without user, password, query and fragment, where secrets are."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


# HTTP ---------------------------------------------------------------------------------------------------


@cache
def _session(process: int) -> "requests.Session":
    """Connections of one process, as a fork cannot share them."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=4 * IN_FLIGHT))
    return session


def _answer(url: str, of_hub: bool, bounds: str = "") -> "requests.Response":
    """The answer to one request, not read yet.

    Raises:
        Transient: if it failed in a way that may pass.
        FileNotFoundError: if there is no such file.
        PermissionError: if it is refused.
        ValueError: if the server's answer is none of those that are understood.
    """
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={bounds}"} if bounds else {})
    if of_hub:
        from huggingface_hub.utils import build_hf_headers

        headers |= build_hf_headers()
    _count(requests=1)
    try:
        answer = _session(os.getpid()).get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Transient(_reason(error)) from None  # its text has the URL with its secrets
    except requests.RequestException as error:
        raise ValueError(f"cannot read {without_secrets(url)}: {_reason(error)}") from None
    if answer.status_code in (200, 206):
        return answer
    answer.close()
    name, status = without_secrets(url), answer.status_code
    if status in (404, 410):
        raise FileNotFoundError(f"there is no {name} (HTTP {status}): check the URL")
    if status in (401, 403):
        access = "set HF_TOKEN" if of_hub else "check the access that its URL or ~/.netrc gives"
        raise PermissionError(f"the server refuses {name} (HTTP {status}): {access}")
    if status in (408, 425, 429) or status >= 500:
        after = answer.headers.get("Retry-After", "")
        raise Transient(f"HTTP {status}", float(after) if after.isdigit() else 0.0)
    raise ValueError(f"the server does not give {name} (HTTP {status}): check the URL")


def _reason(error: Exception) -> str:
    """A failure of the network in short, without the URL."""
    inner = re.findall(r"(?:\[Errno -?\d+\] |Name or service |Read timed|Connection )[\w ]+", str(error))
    return inner[-1].strip() if inner else type(error).__name__


def _over_http(file: RemoteFile, start: int, view: memoryview) -> Iterator[int]:
    """Fill `view` from `start` on by one request; gives the numbers of bytes as they arrive."""
    import requests
    import urllib3

    last = start + len(view) - 1
    with _answer(file.url, file.of_hub, f"{start}-{last}") as answer:
        _check_range(answer, str(file), start, last, file.size)
        etag = answer.headers.get("ETag", "")
        if file.etag and etag != file.etag:
            raise ValueError(
                f"{file} has changed since this run began (ETag {etag or 'none'} instead of {file.etag}):"
                " start the run again"
            )
        done = 0
        try:
            while done < len(view):
                count = answer.raw.readinto(view[done : done + PROGRESS])
                if not count:
                    return
                done += count
                yield count
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Transient(_reason(error)) from None


def _check_range(answer: "requests.Response", name: str, start: int, last: int, size: int) -> None:
    if answer.status_code == 200:
        raise ValueError(
            f"the server of {name} does not serve ranges of bytes: add ++model.cache=true, which downloads"
            " the whole file once, or give a directory"
        )
    given = answer.headers.get("Content-Range", "")
    if given != f"bytes {start}-{last}/{size}":
        raise ValueError(
            f"{name} has another length than before: bytes {start}-{last}/{size} were asked for, and the"
            f" server gives {given or 'no Content-Range'}; start the run again, or give another copy"
        )


def _http_whole(url: str, most: int, of_hub: bool) -> bytes:
    import requests
    import urllib3

    content = bytearray()
    with _answer(url, of_hub) as answer:
        try:
            for piece in answer.iter_content(PROGRESS):
                content += piece
                _count(bytes=len(piece))
                if len(content) > most:
                    raise ValueError(
                        f"{without_secrets(url)} has more than {most} bytes, too many for a config"
                    )
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Transient(_reason(error)) from None
        length = answer.headers.get("Content-Length", "")
        if length.isdigit() and int(length) != len(content):
            raise Transient(f"an answer of {len(content)} bytes instead of {length}")
    return bytes(content)


def _probe(url: str, ranges: bool) -> RemoteFile:
    with _answer(url, False, "0-0") as answer:
        given = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
        size = given[1] if given else answer.headers.get("Content-Length", "0")
        if ranges or not size.isdigit():
            _check_range(answer, without_secrets(url), 0, 0, int(given[1]) if given else 0)
        etag, changed = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
        if answer.status_code == 206:  # else the body is the whole file, and is left
            _count(bytes=len(answer.content))
    return RemoteFile(url, int(size), etag or changed, etag)


def _pieces(file: RemoteFile, target: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, behind the bytes in `target`, which is emptied where the server gives all of it."""
    import requests
    import urllib3

    start, last = target.tell(), file.size - 1
    with _answer(file.url, file.of_hub, f"{start}-{last}" if start else "") as answer:
        if answer.status_code == 206:
            _check_range(answer, str(file), start, last, file.size)
        else:
            target.seek(0)
            target.truncate()
        try:
            yield from answer.iter_content(PROGRESS)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Transient(_reason(error)) from None


# fsspec -------------------------------------------------------------------------------------------------


@cache
def store(scheme: str) -> Any:
    """The fsspec file system of a scheme, configured by fsspec's own variables, such as FSSPEC_S3_ANON.

    Raises:
        ValueError: if the package that opens it is not installed.
    """
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        package = EXTRAS.get(scheme, scheme)
        raise ValueError(
            f"{scheme}:// needs the package {package}: pip install 'weightgeom[{scheme}]'"
        ) from error


def _called(url: str, work: Callable[[Any, str], Any]) -> Any:
    """The result of `work` on a file system, with its failures sorted as those of HTTP are."""
    filesystem, name = store(urlsplit(url).scheme), without_secrets(url)
    _count(requests=1)
    try:
        return work(filesystem, url)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {name}: check the URL") from error
    except PermissionError as error:
        raise PermissionError(f"the store refuses {name}: check the access that its client has") from error
    except Exception as error:  # each store raises errors of its own
        raise Transient(f"{type(error).__name__} of {type(filesystem).__name__}") from None


def _from_store(file: RemoteFile, start: int, view: memoryview) -> Iterator[int]:
    content = _called(file.url, lambda store, url: store.cat_file(url, start=start, end=start + len(view)))
    if len(content) > len(view):
        raise ValueError(f"the store gives {len(content)} bytes of {file} instead of {len(view)}")
    view[: len(content)] = content
    yield len(content)


def _store_whole(url: str, most: int, of_hub: bool) -> bytes:
    size = _called(url, lambda store, url: store.info(url))["size"]
    if size > most:
        raise ValueError(f"{without_secrets(url)} has {size} bytes, too many for a config")
    content = _called(url, lambda store, url: store.cat_file(url))
    _count(bytes=len(content))
    return content


def _pieces_of_store(file: RemoteFile, target: BinaryIO) -> Iterator[bytes]:
    while (start := target.tell()) < file.size:
        stop = min(start + PIECE, file.size)
        if not (piece := _called(file.url, lambda store, url: store.cat_file(url, start=start, end=stop))):  # noqa: B023
            return
        yield piece
