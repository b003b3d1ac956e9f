import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, postgresql

ROOM = 64 * 1024  # bytes


@pytest.fixture(params=["file system", "file size"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory with room for 64 KiB: a file system of that size where mounting is permitted,
    else (and always once) a limit on the size of a file, which fails in the same place."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(directory)]
    if request.param == "file system" and subprocess.run(mount, capture_output=True).returncode == 0:
        yield directory
        # Lazily: a file may still be open that a failed write left so.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    yield directory
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """The URI of a PostgreSQL database."""
    with postgresql() as uri:
        yield uri


@pytest.fixture(scope="session")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An `mlflow server` on PostgreSQL that also serves artifacts; who stops it starts it again."""
    server = Server(database, tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()
