"""A web server on loopback that gives files by ranges of bytes, and fails as it is asked to."""

import hashlib
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from weightgeom.models import byte_ranges


@dataclass
class Files:
    """The files below `root` at `url`.

    `cuts` is how many answers end at a random byte with their connection. `short` cuts every answer for the
    files with these names. Without `ranges`, or without `etags`, there are none. `longer` is added to the
    lengths that ranges are said to be of. `busy` is how many requests are answered with HTTP 503 at first.
    """

    root: Path
    url: str = ""
    cuts: int = 0
    chance: float = 0.5  # that an answer is cut while there are cuts left
    short: set[str] = field(default_factory=set)
    ranges: bool = True
    etags: bool = True
    longer: int = 0
    busy: int = 0
    seed: int = 0
    together: int = 0  # requests that must be waiting at once before any is answered
    most: int = 0  # the largest number of requests that waited at once
    open: int = 0
    requests: list[tuple[str, str | None, dict[str, str]]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # bytes by the file's path
    lock: Any = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)


@contextmanager
def served(root: Path, **options: Any) -> Iterator[Files]:
    """The server, which runs within the block."""
    files = Files(root, **options)

    class Handler(_Handler):
        pass

    Handler.files = files
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # who asked may be gone
    files.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def bucket() -> Iterator[MemoryFileSystem]:
    """A file system of fsspec's own, in memory, that opens `s3://` within the block."""

    class Bucket(MemoryFileSystem):
        protocol = "s3"  # pyright: ignore
        store: ClassVar[dict[str, Any]] = {}  # pyright: ignore
        pseudo_dirs: ClassVar[list[str]] = [""]

    fsspec.register_implementation("s3", Bucket, clobber=True)
    byte_ranges.store.cache_clear()
    try:
        yield byte_ranges.store("s3")
    finally:
        import_module("fsspec.registry")._registry.pop("s3")
        byte_ranges.store.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the end of every answer waits 40 ms for an acknowledgement
    files: Files

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        files, name = self.files, unquote(urlsplit(self.path).path).lstrip("/")
        path = files.root / name
        with files.lock:
            files.requests.append((self.path, self.headers["Range"], dict(self.headers)))
            busy = files.busy > 0
            files.busy -= busy
            files.open += 1
            files.most = max(files.most, files.open)
            files.lock.notify_all()
            files.lock.wait_for(lambda: files.most >= files.together, 60)
            files.open -= 1
        if busy or not path.resolve().is_relative_to(files.root.resolve()) or not path.is_file():
            return self._empty(503 if busy else 404)
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "") if files.ranges else None
        start, end = (int(asked[1]), min(int(asked[2]) + 1, len(content))) if asked else (0, len(content))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content) + files.longer}")
        if files.etags:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with files.lock:
            cut = path.name in files.short or (
                files.cuts > 0 and end - start > 1 and files.random.random() < files.chance
            )
            stop = start + files.random.randrange(end - start) if cut else end
            files.cuts -= cut
            files.sent[name] += stop - start
        self.wfile.write(content[start:stop])
        self.close_connection = cut

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
