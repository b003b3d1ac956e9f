"""A copy of the code, so that what runs is what was submitted however the tree changes in the meantime."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from runners.tracking.provenance import SNAPSHOT, commit, uncommitted_diff

PARTS = ("run.py", "conf", "runners", "weightgeom")  # all that a run consists of
ENDINGS = (".py", ".yaml")


def take_snapshot(repository: Path, target: Path) -> None:
    """Copy the code of `repository`, as it is, to the new directory `target`, with where it came from."""
    for path in _files(repository):
        copy = target / path.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    known = {
        "repository": str(repository),
        "commit": commit(repository),
        "diff": uncommitted_diff(repository),
        "digest": digest(repository),
    }
    (target / SNAPSHOT).write_text(json.dumps(known, indent=2) + "\n")


def digest(repository: Path) -> str:
    """SHA-256 over names and contents of all code; of a snapshot that of what it was made from."""
    if (repository / SNAPSHOT).exists():
        return json.loads((repository / SNAPSHOT).read_text())["digest"]
    total = hashlib.sha256()
    for path in _files(repository):
        total.update(f"{path.relative_to(repository)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


def changed_since(repository: Path, snapshot: Path) -> str:
    """One sentence if the code of `repository` is no longer that of `snapshot`, with the commits; or ''."""
    known = json.loads((snapshot / SNAPSHOT).read_text())
    if digest(repository) == known["digest"]:
        return ""
    then, now = (_named(one) for one in (known["commit"], commit(repository)))
    return f"the code has changed since: it was {then}, and {repository} is {now}"


def python_of(snapshot: Path) -> list[str]:
    """The command that runs this python on the code of `snapshot`, whatever the working directory holds.

    It does not hear USR2 until it listens: the signal would end it otherwise.
    """
    variables = (f"PYTHONPATH={snapshot}", "PYTHONSAFEPATH=1")
    return ["sh", "-c", 'trap "" USR2; exec "$0" "$@"', "env", *variables, sys.executable]


def _named(known: dict[str, str]) -> str:
    if not known:
        return "under no version control"
    return known["git_commit"][:12] + (" with changes" if known["git_dirty"] == "true" else "")


def _files(repository: Path) -> Iterator[Path]:
    for part in PARTS:
        if (repository / part).is_file():
            yield repository / part
        for folder, folders, names in os.walk(repository / part):
            folders[:] = sorted(set(folders) - {"__pycache__", "local"})  # a site's own settings stay there
            yield from (Path(folder, name) for name in sorted(names) if name.endswith(ENDINGS))
