"""Fingerprints of the code and the libraries that a stage's result depends on."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "weightgeom"


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide a trained or measured number."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "trl")}


def code_behind(*modules: str) -> str:
    """Fingerprint of modules of ours and of all of ours that they import, directly or not.

    Comments, docstrings and layout do not count, so that only a change of what the code does makes
    a stage be done again.
    """
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            source = _source(name).read_text()
            found[name], tree = _dumped(source), _stripped(source)
            waiting += [imported for imported in _imports(tree) if imported.split(".")[0] == PACKAGE]
    return _hash(found)


def package() -> str:
    """Fingerprint of all code of the package but what only draws."""
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    files = [path for path in sorted(root.rglob("*.py")) if not path.name.startswith("figures")]
    return _hash({str(path.relative_to(root)): _dumped(path.read_text()) for path in files})


def _source(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} has no source"
    return Path(spec.origin)


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module
            if node.module.split(".")[0] == PACKAGE:
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in names if _is_module(name))


def _is_module(name: str) -> bool:
    """Whether what is imported from a package is a module of it, and not a name in one."""
    package, _, last = name.rpartition(".")
    source = _source(package)
    return source.name == "__init__.py" and source.with_name(f"{last}.py").is_file()


@cache  # a run asks for each of its stages
def _dumped(source: str) -> str:
    return ast.dump(_stripped(source))


def _stripped(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return tree


def _hash(parts: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]
