"""Copies of the code: jobs run the submitted code, whatever changes in the repository afterwards."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from filecmp import cmp
from pathlib import Path

from runners.disk import read_object
from runners.modules import CODE, is_house, reached
from runners.tracking.provenance import SNAPSHOT, code_version, is_installed, uncommitted_diff

PACKAGES = ("runners", "weightgeom")
PARTS = ("run.py", "conf", *PACKAGES)  # all that a run consists of in a checkout
ENDINGS = (".py", ".yaml", ".html")
MODULES = "modules"  # in a copy: the user's own
KNOWN = {"digest": str, "commit": dict}  # of a copy's description


def take_snapshot(repository: Path, target: Path, modules: Iterable[str] = ()) -> None:
    """Copy the code of `repository`, as it is, to the new directory `target`, with where it came from.

    The user's own `modules` go with it, and those that they import: of a package all its code, as it may
    import by names that it makes up.
    """
    own = {Path(MODULES, place): path for place, path in _own_files(modules)}
    for place, path in [*((path.relative_to(repository), path) for path in _files(repository)), *own.items()]:
        copy = target / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    known = {
        "repository": str(repository),
        "commit": code_version(repository),
        "diff": uncommitted_diff(repository),
        "digest": digest(repository),
        MODULES: {str(place): str(path) for place, path in own.items()},
    }
    (target / SNAPSHOT).write_text(json.dumps(known, indent=2) + "\n")


def digest(repository: Path) -> str:
    """SHA-256 over the names and contents of all code; for a snapshot, the digest of its source tree."""
    if (repository / SNAPSHOT).exists():
        return json.loads((repository / SNAPSHOT).read_text())["digest"]
    total = hashlib.sha256()
    for path in _files(repository):
        total.update(f"{path.relative_to(repository)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


def changed_since(repository: Path, snapshot: Path) -> str:
    """One sentence if the code of `repository` is no longer that of `snapshot`, with the commits; or ''.

    The same of the user's own modules, with the first file that has changed.
    """
    path = snapshot / SNAPSHOT
    advice = "copy the current code anew with resubmit --new-code"
    if not path.is_file():
        raise FileNotFoundError(f"{path}, which describes the submitted code, is missing: {advice}")
    known = read_object(path, advice)
    wrong = [name for name, kind in KNOWN.items() if not isinstance(known.get(name), kind)]
    wrong += [
        name for name in ("commit", MODULES) if name not in wrong and not _is_of_text(known.get(name, {}))
    ]
    if wrong:
        raise ValueError(f"{path} is damaged (it has no {wrong[0]} of a copy's): {advice}")
    if digest(repository) == known["digest"]:
        own = {Path(path): snapshot / copy for copy, path in known.get(MODULES, {}).items()}
        other = [
            path for path, copy in own.items() if not path.is_file() or not cmp(path, copy, shallow=False)
        ]
        return f"the code has changed since: {other[0]} is not what it was" if other else ""
    then, now = (_named(commit) for commit in (known["commit"], code_version(repository)))
    return f"the code has changed since: it was {then}, and {repository} is {now}"


def _is_of_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def python_of(
    snapshot: Path, deaf: str = "USR2", within: Sequence[str] = (), python: str = sys.executable
) -> list[str]:
    """The command that runs `python` on the code of `snapshot`, whatever the working directory holds.

    Until it listens it does not hear the signals `deaf`, which would end it otherwise. `within` is a command
    that runs others, as in a container.
    """
    variables = (f"PYTHONPATH={snapshot}{os.pathsep}{snapshot / MODULES}", "PYTHONSAFEPATH=1")
    return ["sh", "-c", f'trap "" {deaf}; exec "$0" "$@"', *within, "env", *variables, python]


def _named(known: dict[str, str]) -> str:
    if "git_commit" not in known:
        return " ".join(known.values()) or "under no version control"
    return known["git_commit"][:12] + (" with changes" if known["git_dirty"] == "true" else "")


def _own_files(modules: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """Files of the user's modules and of those that they import, each behind its place on Python's path."""
    own = [module for name, module in reached(*modules, running=True).items() if not is_house(name)]
    for module in own:
        if module.path is not None:
            parts = module.name.split(".")
            yield Path(*parts if module.directories else parts[:-1], module.path.name), module.path
        if module.path is not None and module.directories and "." not in module.name:
            (root,) = module.directories
            yield from ((Path(module.name, path.relative_to(root)), path) for path in _code(root))


def _code(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name.isidentifier() and name != "__pycache__")
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(CODE))


def _files(repository: Path) -> Iterator[Path]:
    for part in PACKAGES if is_installed(repository) else PARTS:  # next to a package, `conf` is another's
        if (repository / part).is_file():
            yield repository / part
        for folder, folders, names in os.walk(repository / part):
            folders[:] = sorted(set(folders) - {"__pycache__", "local"})  # a site's own settings stay there
            yield from (Path(folder, name) for name in sorted(names) if name.endswith(ENDINGS))
