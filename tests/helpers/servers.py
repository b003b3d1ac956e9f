"""Real servers for tests, on this machine alone: PostgreSQL, `mlflow server`, and a proxy that misbehaves."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

Fault = Literal["pass", "refuse", "lose answer", "cut", "hang"]


def needed(installed: object, what: str) -> None:
    """Skip the test if `found` is nothing."""
    if not installed:
        pytest.skip(f"there is no {what} here: .ci/run installs it")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def postgresql() -> Iterator[str]:
    """The URI of an empty database, in a PostgreSQL that listens on a socket of its own alone."""
    programs_of_versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    needed(programs_of_versions, "PostgreSQL")
    programs = programs_of_versions[-1].parent
    # Not under pytest's folder: others may not enter that, and a socket's path has 107 characters at most.
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    root = os.geteuid() == 0  # as which PostgreSQL refuses to run
    other: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if root else {}
    if root:
        shutil.chown(directory, "postgres", "postgres")
    initialise = [programs / "initdb", "-D", f"{directory}/data", "-A", "trust", "-U", "tester", "--no-sync"]
    subprocess.run(initialise, cwd=directory, check=True, capture_output=True, **other)
    settings = ["listen_addresses=", f"unix_socket_directories={directory}", "fsync=off"]
    serve = [
        programs / "postgres",
        "-D",
        f"{directory}/data",
        *(part for setting in settings for part in ("-c", setting)),
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(serve, cwd=directory, stdout=log, stderr=log, **other)
    try:
        create = [programs / "createdb", "-h", directory, "-U", "tester", "mlflow"]
        _until(lambda: subprocess.run(create, capture_output=True).returncode == 0, process)
        yield f"postgresql+psycopg2://tester@/mlflow?host={directory}"
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown
        process.wait(30)
        shutil.rmtree(directory)


@dataclass
class Server:
    """An `mlflow server` that can be killed, stopped and started again; it keeps its port."""

    store: str  # URI of its database
    directory: Path  # of its artifacts and its log
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {
            "--backend-store-uri": self.store,
            "--artifacts-destination": self.directory / "artifacts",
            "--host": "127.0.0.1",
            "--port": self.port,
            "--workers": 2,
        }
        program = [Path(sys.executable).with_name("mlflow"), "server"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*program, *(str(part) for option in options.items() for part in option)],
                cwd=self.directory,
                env=kept | quiet,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its workers are processes, too: signals go to all of them
            )
        _until(self._answers, self.process)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server and all its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.send(signal.SIGKILL)
            self.process.wait(30)
            self.process = None

    def _answers(self) -> bool:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except OSError:
                return False


@dataclass
class Proxy:
    """Stands before a server and does to each request what `fault` says of its number and its path.

    `refuse` answers 500 without asking the server; `lose answer` answers 500 after the server has done what
    was asked, `cut` not at all; `hang` waits for `release` and then passes the request on, asked or not.
    """

    port: int  # of the server
    fault: Callable[[int, str], Fault] = lambda number, path: "pass"
    requests: list[str] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    uri: str = ""

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        server.handle_error = lambda request, client_address: None  # who asked may be gone
        self.uri = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.release.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                self.close_connection = True
                if self.raw_requestline and self.parse_request():
                    self._treat()

            def _treat(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append(f"{self.command} {self.path}")
                fault = proxy.fault(len(proxy.requests) - 1, self.path)
                if fault == "hang":
                    proxy.release.wait()
                status, headers, answer = 500, {}, b"out of order"
                if fault != "refuse":
                    status, headers, answer = self._forwarded(body)
                if fault == "lose answer":
                    status, headers, answer = 500, {}, b"out of order"
                if fault == "cut":
                    return
                self.send_response_only(status)
                for name, value in (headers | {"Content-Length": str(len(answer))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def _forwarded(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                with closing(http.client.HTTPConnection("127.0.0.1", proxy.port)) as connection:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    kept = ("Content-Type", "Content-Disposition")
                    headers = {name: value for name, value in answer.getheaders() if name in kept}
                    return answer.status, headers, answer.read()

        return Handler


def _until(holds: Callable[[], bool], process: "subprocess.Popen[Any]", seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, f"the server ended with {process.returncode}"
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.1)
