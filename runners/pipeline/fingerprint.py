"""Fingerprints of the code, the data and the libraries that a stage's result depends on."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from runners.modules import HOUSE, LIBRARIES, find, packages, reached, required

if TYPE_CHECKING:
    from weightgeom.interfaces import Examples


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide a trained or measured number."""
    return {name: metadata.version(name) for name in LIBRARIES}


def code_behind(*modules: str) -> str:
    """Fingerprint of modules and of the modules that they import, directly or not, ours and the user's.

    Comments, docstrings, layout, imports for type checkers and modules that read finished tables do not
    count. Of the packages that a module lies in, statements count, and other imports do not. A library's
    module counts by its version.

    Raises:
        ValueError: if the code of a module is in no file.
    """
    installed = [name for name in modules if required(name) is None]
    parts = {name: version for name in installed if (version := _version(name))}
    reach = reached(*modules)
    parts |= {name: f"{module.code} {sorted(module.imports)}" for name, module in reach.items()}
    for name in {outer for inner in reach for outer in packages(inner)} - set(reach):
        outer = find(name)
        assert outer is not None
        statements, imports = outer.on_the_way
        parts[name] = f"{statements} {sorted(imports)}"
    return _hash(parts)


def package(*modules: str) -> str:
    """Fingerprint of all code of the package that decides a number, and of that behind `modules`."""
    house = find(HOUSE)
    assert house is not None
    files = [path.relative_to(root) for root in house.directories for path in root.rglob("*.py")]
    places = [path.with_suffix("").parts for path in files]
    names = [".".join((HOUSE, *parts)) for parts in places if all(map(str.isidentifier, parts))]
    return code_behind(*(name.removesuffix(".__init__") for name in names), *modules)


def contents(examples: "Examples") -> str:
    """SHA-256 over all that a data set holds, whereas its own digest leaves out questions and abstentions."""
    names = list(examples.groups)
    parts: list[Sequence[object]] = [examples.text, examples.heldout, examples.pairs, examples.heldout_pairs]
    parts += [examples.questions, examples.abstentions, names, *(examples.groups[name] for name in names)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n".encode())
        for item in part:
            digest.update(repr(item).encode() + b"\n")
    return digest.hexdigest()


def named_files(specification: object) -> dict[str, str]:
    """Fingerprints of the contents of files and checkpoints that a specification names by their paths."""
    from weightgeom.bases.hub import identity
    from weightgeom.bases.remote import known_checkpoint
    from weightgeom.text.files import sha256

    if isinstance(specification, str):
        path = os.path.expanduser(specification)
        if os.path.isfile(path):
            return {specification: sha256(Path(path))}
        if (remote := known_checkpoint(specification)) is not None:
            return {specification: identity(remote)}
        if any(os.path.isfile(os.path.join(path, f"{kind}config.json")) for kind in ("", "adapter_")):
            return {specification: identity(Path(path))}
    if isinstance(specification, Mapping):
        specification = list(specification.values())
    if isinstance(specification, list | tuple):
        return {name: digest for item in specification for name, digest in named_files(item).items()}
    return {}


@cache  # to list the distributions takes long
def _version(module: str) -> str:
    """The distributions of a library's module, with their versions; "" for Python's own."""
    names = metadata.packages_distributions().get(module.split(".")[0], [])
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names)))


def _hash(parts: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]
