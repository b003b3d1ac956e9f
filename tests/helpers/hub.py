"""A stand-in for the hub, on loopback, that the real client downloads from."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PATHS = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<api>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|paths-info)/(?P<at>[^/]+)(?:/(?P<below>.*))?|/(?P<refs>refs))?"
    r"|(?:/(?P<prefix>datasets))?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)


@dataclass
class Hub:
    """Repositories (`models/lab/m` or `datasets/lab/d`), of which each revision is a directory.

    A file of `broken` (`COMMIT/PATH`) is cut at its half the first time it is sent, `gated`
    repositories are refused. `requests` has what was asked for: the method, the path and the range.
    """

    repositories: Mapping[str, Mapping[str, Path]]
    broken: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit of a branch or of itself."""
        commits = {name: commit_of(repository, name) for name in self.repositories.get(repository, {})}
        return revision if revision in commits.values() else commits.get(revision)

    def directory(self, repository: str, commit: str) -> Path:
        return next(
            path
            for name, path in self.repositories[repository].items()
            if commit_of(repository, name) == commit
        )


def commit_of(repository: str, revision: str) -> str:
    """The stand-in for a commit: 40 digits that depend on the names alone."""
    return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()


@contextmanager
def served(repositories: Mapping[str, Mapping[str, Path]]) -> Iterator[Hub]:
    """A hub that runs within the block."""
    hub = Hub(repositories)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the end of every answer waits 40 ms for an acknowledgement
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers["Range"]))
        match = PATHS.fullmatch(unquote(urlsplit(self.path).path))
        if match is None:
            return self._refuse("EntryNotFound")
        kind = match["kind"] or match["prefix"] or "models"
        repository = f"{kind}/{match['api'] or match['repo']}"
        if repository in self.hub.gated:
            return self._refuse("GatedRepo", 403)
        if repository not in self.hub.repositories:
            return self._refuse("RepoNotFound")
        if match["refs"]:
            names = self.hub.repositories[repository]
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(repository, name)}
                for name in names
            ]
            return self._json({"branches": branches, "converts": [], "tags": []})
        commit = self.hub.commit(repository, match["at"] or match["revision"] or "main")
        if commit is None:
            return self._refuse("RevisionNotFound")
        directory = self.hub.directory(repository, commit)
        if match["file"]:
            return self._file(directory / match["file"], commit)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        names = [str(path.relative_to(directory)) for path in files]
        if match["what"] == "paths-info":
            length = int(self.headers["Content-Length"] or 0)
            names = [name for name in names if name in unquote(self.rfile.read(length).decode())]
        entries = [entry(directory, name) for name in names if name.startswith(match["below"] or "")]
        if match["what"] in ("tree", "paths-info"):
            return self._json(entries)
        siblings = [{"rfilename": name} for name in names]
        return self._json(
            {"id": repository.partition("/")[2], "sha": commit, "siblings": siblings, "tags": []}
        )

    do_HEAD = do_POST = do_GET

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self._refuse("EntryNotFound")
        content, start = path.read_bytes(), 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        end = len(content)
        if asked:
            start, end = int(asked[1]), min(end, int(asked[2] or end) + 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "HEAD":
            name = f"{commit}/{path.name}"
            cut = name in self.hub.broken
            self.hub.broken.discard(name)
            self.wfile.write(content[start : len(content) // 2 if cut else end])
            self.close_connection = cut

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def entry(directory: Path, name: str) -> dict[str, Any]:
    """A file as the hub's tree lists it."""
    content = (directory / name).read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
