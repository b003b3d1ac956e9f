"""Python modules as files: the modules that an object's code reaches, found without running them."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property, partial
from importlib.machinery import all_suffixes
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, NamedTuple

HOUSE = "weightgeom"  # read as files even where it is installed
LIBRARIES = ("torch", "transformers", "trl")  # never read, even where they are installed from a checkout
INSTALLED = {"site-packages", "dist-packages"}
STANDARD = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # of statements, in a statement
CODE = tuple(all_suffixes())  # .py and the endings of compiled modules


class Import(NamedTuple):
    """An imported module, and the name taken from it; "" for the module itself."""

    module: str
    name: str = ""


@dataclass(frozen=True)
class Module:
    """A module of ours or of the user's.

    A package has `directories`; one without an `__init__.py` has no `path`.
    """

    name: str
    path: Path | None
    directories: tuple[Path, ...] = ()

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree without docstrings and type-only imports; empty for a compiled module.

        Raises:
            ValueError: if the file is not valid Python.
        """
        tree = self._parsed()
        _strip(tree)
        return tree

    @cached_property
    def code(self) -> str:
        """SHA-256 of its code: equal for files that differ only in comments, docstrings and layout."""
        if self.path is not None and self.path.suffix != ".py":
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        return hashlib.sha256(ast.dump(self.tree).encode()).hexdigest()

    @cached_property
    def imports(self) -> frozenset[Import]:
        """The modules that its imports lead to, those within functions included and libraries left out."""
        return self._leading_to(self._written())

    @cached_property
    def on_the_way(self) -> tuple[str, frozenset[Import]]:
        """The part of a package that matters to all its modules: statements besides imports, as text.

        With them go the imports whose names they use.
        """
        statements = [node for node in self.tree.body if not _imports(node)]
        used = {part.id for node in statements for part in ast.walk(node) if isinstance(part, ast.Name)}
        bound = {written for name in used for written in self.bound(name)} - {Import(self.name)}
        return " ".join(map(ast.dump, statements)), self._leading_to(bound)

    def bound(self, name: str) -> list[Import]:
        """The imports that give a package its `name`; the package itself, if it defines the name."""
        # A name that is imported when it is first asked for is written down for type checkers alone.
        return self._bound(self.tree, name) or self._bound(self._whole, name)

    def _bound(self, tree: ast.Module, name: str) -> list[Import]:
        bound = []
        for node in _run_at_import(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound += [written for given, written in self._names(node) if given == name]
            elif _defines(node, name):
                bound.append(Import(self.name))
        return bound

    @cached_property
    def _whole(self) -> ast.Module:
        return self._parsed()

    def _parsed(self) -> ast.Module:
        if self.path is None or self.path.suffix != ".py":
            return ast.Module([], [])
        try:
            return ast.parse(self.path.read_bytes())
        except SyntaxError as error:
            raise ValueError(f"{self.path} line {error.lineno} is not valid Python: {error.msg}") from error

    def _leading_to(self, imports: Iterable[Import]) -> frozenset[Import]:
        return frozenset(
            origin for written in imports if self._counts(written) for origin in _origins(written)
        )

    def _counts(self, written: Import) -> bool:
        """Whether an import may lead to a module of ours or, outside the house, of the user's."""
        return is_house(written.module) or not is_house(self.name)

    def _written(self) -> Iterator[Import]:
        plain = set()
        for node in _statements(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = list(self._names(node))
                yield from (written for _, written in names)
                plain |= set(names) if isinstance(node, ast.Import) else set()
        plain = {
            (given, written) for given, written in plain if self._counts(written) and find(written.module)
        }
        if not plain and (self.path is None or b"import_module" not in self.path.read_bytes()):
            return  # to look at every expression takes long
        for node in ast.walk(self.tree):
            match node:
                case ast.Attribute(value=ast.Name(id=used), attr=name):
                    yield from (Import(written.module, name) for given, written in plain if given == used)
                case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                    if _name(function) == "import_module" and not name.startswith("."):
                        yield Import(name)

    def _names(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Import]]:
        """The imports of a statement, each behind the name that it binds."""
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = self.name if self.directories else self.name.rpartition(".")[0]
                base = resolve_name("." * node.level + base, package)
            for alias in node.names:
                taken = "" if alias.name == "*" else alias.name
                yield alias.asname or alias.name, Import(base, taken)
            return
        for alias in node.names:
            if alias.asname:
                yield alias.asname, Import(alias.name)
                continue
            # `import a.b` binds `a`, through which any part of `a` can be used.
            bound = alias.name.partition(".")[0]
            yield from ((bound, Import(name)) for name in [*packages(alias.name), alias.name])


@cache  # so that a key is of the code that was there when the process started, and runs
def find(name: str) -> Module | None:
    """The module of this name; None if it is a library's, or does not exist.

    Raises:
        ValueError: if its code is in no file of its own, such as in an archive.
    """
    parent, _, last = name.rpartition(".")
    if not parent:
        return _top(name)
    package = find(parent)
    return None if package is None else _inside(package, last)


def required(name: str) -> Module | None:
    """The module in which an object is defined; None if it is a library's.

    Raises:
        ValueError: if its code is in no file, such as that of a notebook.
    """
    module = find(name)
    if module is None and not _is_library(name.split(".")[0]):
        raise _unreadable(name, "a notebook or an interactive session has no file")
    return module


def reached(*names: str, running: bool = False) -> dict[str, Module]:
    """The modules of these names and those that they import, directly or not, libraries left out.

    A package is not reached merely because one of its modules is: its other imports do not matter to that
    module. With `running` it is, as Python runs it first, and the house is left out.
    """
    modules: dict[str, Module] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        left_out = name in modules or _reads_tables(name) or (running and is_house(name))
        module = None if left_out else find(name)
        if module is not None:
            modules[name] = module
            waiting += [imported.module for imported in module.imports]
            for outer in packages(name):
                package = find(outer)
                assert package is not None
                waiting += [outer] if running else [imported.module for imported in package.on_the_way[1]]
    return modules


def packages(name: str) -> list[str]:
    """The packages that a module lies in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def modules_of(*things: object) -> list[str]:
    """The modules in which objects, functions and all objects in their fields are defined.

    The fields of a library's objects are left out.

    Raises:
        ValueError: if one is defined in no file.
    """
    names: dict[str, None] = {}
    waiting, seen = list(things), {}
    while waiting:
        thing = waiting.pop(0)
        if id(thing) in seen or isinstance(thing, str | bytes | int | float | None):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        elif isinstance(thing, partial):
            waiting += [thing.func, thing.args, thing.keywords]
        else:
            name = getattr(thing, "__module__", None) or type(thing).__module__
            names[name] = None
            if required(name) is not None and not isinstance(thing, type):
                waiting += fields_of(thing).values()
    return list(names)


def fields_of(thing: object) -> dict[str, Any]:
    """The fields of an object, a dataclass or not, by name."""
    if is_dataclass(thing):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    return dict(getattr(thing, "__dict__", {}))


def targets(tree: object) -> Iterator[str]:
    """The modules that the `_target_`s of a configuration name, libraries left out."""
    if isinstance(tree, Mapping):
        target = tree.get("_target_")
        if isinstance(target, str):
            yield from [name for name in reversed(packages(target)) if find(name) is not None][:1]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from targets(branch)


def travelling(config: object, *things: object) -> list[str]:
    """The user's own modules that a configuration names, or that define the objects made from it.

    Raises:
        ValueError: if the code of one is in no file.
    """
    names = dict.fromkeys([*targets(config), *modules_of(*things)])
    return [name for name in names if not is_house(name) and required(name) is not None]


def own_places() -> list[str]:
    """The directories on `sys.path`, those of installed libraries left out."""
    places = [Path(entry).resolve() for entry in sys.path]
    return [str(place) for place in places if place.is_dir() and not is_installed_file(place)]


def _top(name: str) -> Module | None:
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__spec__ is None:  # a script or a notebook, which `find_spec` refuses
        file = getattr(loaded, "__file__", None)
        return None if file is None else Module(name, _file(name, file))
    if _is_library(name):
        return None
    spec = find_spec(name)
    if spec is None:
        return None
    directories = tuple(Path(place) for place in spec.submodule_search_locations or ())
    return Module(name, None if spec.origin is None else _file(name, spec.origin), directories)


def _inside(package: Module, last: str) -> Module | None:
    """The module `last` of a package."""
    name = f"{package.name}.{last}"
    places = [place / last for place in package.directories]
    for place in places:
        for suffix in CODE:
            if (file := place / f"__init__{suffix}").is_file():
                return (
                    None if is_installed_file(file) and not is_house(name) else Module(name, file, (place,))
                )
            if (file := place.with_name(f"{last}{suffix}")).is_file():
                return None if is_installed_file(file) and not is_house(name) else Module(name, file)
    directories = tuple(place for place in places if place.is_dir())
    return Module(name, None, directories) if directories else None


def is_house(name: str) -> bool:
    """Whether a module belongs to this repository."""
    return name.split(".")[0] in (HOUSE, "runners", "run")


def _is_library(top: str) -> bool:
    """Whether the module or package of this name is installed, or comes with Python."""
    if top in LIBRARIES:
        return True
    loaded = sys.modules.get(top)
    spec = None if top == HOUSE or (loaded and loaded.__spec__ is None) else find_spec(top)
    if spec is None:
        return False
    if spec.origin is not None and spec.has_location:
        return is_installed_file(Path(spec.origin))
    return all(
        is_installed_file(Path(place)) for place in spec.submodule_search_locations or ()
    )  # or built in


def is_installed_file(path: Path) -> bool:
    """Whether a file is that of an installed library, or comes with Python."""
    path = path.resolve()
    return bool(INSTALLED.intersection(path.parts)) or any(path.is_relative_to(place) for place in STANDARD)


def _file(name: str, origin: str) -> Path:
    path = Path(origin)
    if not path.is_file():
        raise _unreadable(name, f"{origin} is not a file")
    return path


def _unreadable(name: str, why: str) -> ValueError:
    return ValueError(
        f"the code of module {name} cannot be read ({why}): save it as a .py file in a directory on"
        " PYTHONPATH"
    )


def _origins(written: Import, before: frozenset[Import] = frozenset()) -> Iterator[Import]:
    """The modules that an import leads to, through packages that pass on the names of their modules."""
    module = find(written.module)
    if module is None or written in before:
        return
    if not module.directories or not written.name:
        yield written
        return
    submodule = f"{written.module}.{written.name}"
    further = [bound for bound in module.bound(written.name) if bound != written]
    if find(submodule) is not None:
        further.append(Import(submodule))
    for bound in further or [Import(written.module)]:
        yield from _origins(bound, before | {written})


def _reads_tables(name: str) -> bool:
    """Whether a module draws or summarises finished tables: no number in a table depends on it."""
    return any(
        name == room or name.startswith(f"{room}.") for room in (f"{HOUSE}.analysis", f"{HOUSE}.figures")
    )


def _imports(node: ast.AST) -> bool:
    """Whether a statement is an import, or `__all__`, which lists imports."""
    assigned = node.targets if isinstance(node, ast.Assign) else []
    return isinstance(node, ast.Import | ast.ImportFrom) or any(_name(to) == "__all__" for to in assigned)


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those within functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _run_at_import(child)


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Name):
        return node.id == name and isinstance(node.ctx, ast.Store)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name


def _name(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements in a node, those within statements included."""
    for name in BLOCKS:
        if isinstance(statements := getattr(node, name, None), list):
            for statement in statements:
                yield statement
                yield from _statements(statement)


def _strip(node: ast.AST) -> None:
    """Remove docstrings and the imports for type checkers from all statements in a node, which is mutated."""
    for name in BLOCKS:
        if isinstance(statements := getattr(node, name, None), list):
            kept = [inner for statement in statements for inner in _stripped(statement)]
            setattr(node, name, kept)


def _stripped(statement: ast.AST) -> list[ast.AST]:
    match statement:
        case ast.Expr(value=ast.Constant(value=str())):
            return []
        case ast.If() if _name(statement.test) == "TYPE_CHECKING":
            _strip(otherwise := ast.Module(statement.orelse, []))
            return list(otherwise.body)
    _strip(statement)
    return [statement]
