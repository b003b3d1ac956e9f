import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runners import modules
from runners.pipeline import fingerprint
from runners.pipeline.fingerprint import code_behind, contents, libraries, named_files, package
from weightgeom.text.examples import Examples, Pair, Question

SOURCES = {
    "__init__.py": '"""A planted package."""\n',
    "training.py": "from planted.checkpoints import save\n\n\ndef fit():\n    return save()\n",
    "checkpoints.py": 'def save():\n    """Save."""\n    return 1  # the start\n',
    "probe.py": "import planted.table\nfrom planted import checkpoints\n",
    "table.py": "UNIT = 'nats'\n",
    "figures.py": "COLOUR = 'grey'\n",
    "analysis.py": "COLOUR = 'grey'\n",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `planted` that stands in for ours."""
    directory = tmp_path / "planted"
    directory.mkdir()
    for name, source in SOURCES.items():
        (directory / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fingerprint, "HOUSE", "planted")
    monkeypatch.setattr(modules, "HOUSE", "planted")
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return directory


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A process reads a module once; here one stands for many."""
    modules.find.cache_clear()
    yield
    modules.find.cache_clear()


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    modules.find.cache_clear()


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line)
    modules.find.cache_clear()


def test_comments_docstrings_and_layout_are_no_change_of_the_code(planted: Path) -> None:
    before = code_behind("planted.training"), package()
    change(planted / "checkpoints.py", "  # the start", "  # the very start")
    change(planted / "checkpoints.py", '"""Save."""', '"""Save at once."""')
    change(planted / "training.py", "\n\n\n", "\n")
    assert (code_behind("planted.training"), package()) == before


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        ("planted.training", "training.py"),
        ("planted.training", "checkpoints.py"),
        ("planted.probe", "table.py"),  # import planted.table
        ("planted.probe", "checkpoints.py"),  # from planted import checkpoints
    ],
)
def test_a_change_of_a_module_or_of_what_it_imports_is_a_change_of_the_code(
    planted: Path, module: str, changed: str
) -> None:
    before = code_behind(module), package()
    append(planted / changed, "more = 1\n")
    after = code_behind(module), package()
    assert after[0] != before[0] and after[1] != before[1]


def test_a_module_that_is_not_imported_does_not_count(planted: Path) -> None:
    before = code_behind("planted.training")
    change(planted / "table.py", "nats", "bits")
    assert code_behind("planted.training") == before


def test_the_code_behind_two_modules_is_that_of_both(planted: Path) -> None:
    before = code_behind("planted.training", "planted.table")
    change(planted / "table.py", "nats", "bits")
    after = code_behind("planted.training", "planted.table")
    change(planted / "checkpoints.py", "1", "2")
    assert len({before, after, code_behind("planted.training", "planted.table")}) == 3


def test_what_only_reads_tables_is_no_change_of_the_package(planted: Path) -> None:
    before = package()
    change(planted / "figures.py", "grey", "black")
    change(planted / "analysis.py", "grey", "black")
    assert package() == before


DESK = {
    "desk/__init__.py": "from .spread import Spread as Width\nfrom desk import other\nSCALE = 1\n",
    "desk/spread.py": "class Spread: pass\n\n\nclass Narrow: pass\n",
    "desk/other.py": "SIZE = 1\n",
    "desk/deep/__init__.py": "",
    "desk/deep/probe.py": (
        "from typing import TYPE_CHECKING\nimport json\nfrom .. import Width\n"
        "if TYPE_CHECKING:\n    from desk import typed\n\n\n"
        "def measure():\n    import loose\n    from . import near\n"
    ),
    "desk/deep/near.py": "",
    "desk/typed.py": "",
    "loose.py": "from importlib import import_module\n\nimport_module('named')\n",
    "named.py": "",
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's package and loose modules."""
    for name, source in DESK.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "changed",
    [
        "desk/deep/probe.py",
        "desk/spread.py",  # behind a name that the package passes on
        "desk/deep/near.py",  # relative, in a function
        "loose.py",  # absolute, in a function
        "named.py",  # by import_module
        "desk/__init__.py",  # a statement of the package, which runs before the probe
        "desk/deep/__init__.py",
    ],
)
def test_what_a_module_of_the_users_imports_in_whatever_way_is_its_code(desk: Path, changed: str) -> None:
    before = code_behind("desk.deep.probe")
    append(desk / changed, "more = 1\n")
    assert code_behind("desk.deep.probe") != before


@pytest.mark.parametrize("changed", ["desk/other.py", "desk/typed.py"])
def test_further_imports_of_the_package_and_imports_for_types_do_not_count(desk: Path, changed: str) -> None:
    before = code_behind("desk.deep.probe")
    append(desk / changed, "more = 1\n")
    (desk / "desk/unused.py").write_text("import desk\n")
    append(desk / "desk/__init__.py", "from desk import unused\n__all__ = ['unused']\n")
    assert code_behind("desk.deep.probe") == before
    assert code_behind("desk") != before


def test_another_object_behind_the_same_name_is_a_change(desk: Path) -> None:
    before = code_behind("desk.deep.probe")
    change(desk / "desk/__init__.py", "Spread as", "Narrow as")
    assert code_behind("desk.deep.probe") != before


def test_a_name_that_the_package_defines_or_takes_by_a_star_is_the_whole_packages(desk: Path) -> None:
    for taken in ("SCALE", "SIZE"):  # defined there; from other, by the star
        change(desk / "desk/__init__.py", "from desk import other", "from desk.other import *")
        change(desk / "desk/deep/probe.py", "import Width", f"import {taken}")
        before = code_behind("desk.deep.probe")
        append(desk / "desk/other.py", "more = 1\n")
        assert code_behind("desk.deep.probe") != before
        change(desk / "desk/__init__.py", "from desk.other import *", "from desk import other")
        change(desk / "desk/deep/probe.py", f"import {taken}", "import Width")


@pytest.mark.parametrize("taken", ["from desk import late", "import desk as lab\n\nlab.late"])
def test_a_name_that_is_imported_when_it_is_asked_for_leads_to_its_module(desk: Path, taken: str) -> None:
    append(
        desk / "desk/__init__.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from desk.typed import late\n"
        "def __getattr__(name): ...\n",
    )
    append(desk / "loose.py", f"{taken}\n")
    before = code_behind("loose")
    append(desk / "desk/typed.py", "late = 1\n")
    assert code_behind("loose") != before


def test_what_reads_tables_does_not_count_for_a_module_that_imports_it(planted: Path) -> None:
    append(planted / "table.py", "def figure():\n    from planted import figures, analysis\n")
    before = code_behind("planted.table")
    change(planted / "figures.py", "grey", "black")
    change(planted / "analysis.py", "grey", "black")
    assert code_behind("planted.table") == before


def test_the_code_of_a_run_is_that_of_the_package_and_the_users_own(planted: Path, desk: Path) -> None:
    alone, both = package(), package("desk.deep.probe")
    append(desk / "desk/spread.py", "more = 1\n")
    assert package() == alone and len({alone, both, package("desk.deep.probe")}) == 3


def test_what_the_statements_of_a_package_use_counts_for_all_its_modules(desk: Path) -> None:
    change(desk / "desk/__init__.py", "SCALE = 1", "SCALE = other.SIZE")
    before = code_behind("desk.deep.probe")
    change(desk / "desk/other.py", "SIZE = 1", "SIZE = 2")
    assert code_behind("desk.deep.probe") != before


@pytest.mark.slow
def test_a_library_counts_by_its_version(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint._version.cache_clear()
    before = code_behind("desk.spread", "pydantic.fields")
    assert code_behind("desk.spread", "json") == code_behind("desk.spread") != before
    fingerprint._version.cache_clear()
    monkeypatch.setattr(fingerprint.metadata, "version", lambda name: "another")
    assert code_behind("desk.spread", "pydantic.fields") != before
    fingerprint._version.cache_clear()


def test_data_count_by_all_that_they_hold() -> None:
    several = [
        Examples("a", ["t"], ["h"], [], [], digest="same"),
        Examples("a", ["t"], [], [Pair("p", "c", "r")], [], digest="same"),
        Examples("a", ["t"], [], [], [Pair("p", "c", "r")], digest="same"),
        Examples("a", ["t"], ["h"], [], [], digest="same", questions=[Question("q", "a")]),
        Examples("a", ["t"], ["h"], [], [], digest="same", groups={"known": [Question("q", "a")]}),
        Examples("a", ["t"], ["h"], [], [], digest="same", groups={"other": [Question("q", "a")]}),
        Examples("a", ["t"], ["h"], [], [], digest="same", abstentions=["no idea"]),
    ]
    assert len({contents(examples) for examples in several}) == len(several)
    first, *_ = several
    assert contents(replace(first, name="b", digest="another")) == contents(first)


def test_the_fingerprint_of_our_own_code_is_16_hex_digits() -> None:
    for digits in (package(), code_behind("weightgeom.objectives.dpo", "weightgeom.training.fit")):
        assert len(digits) == 16 and int(digits, 16) >= 0


def test_the_libraries_that_decide_a_number_are_named_with_their_versions() -> None:
    assert set(libraries()) == {"torch", "transformers", "trl"}
    assert all(version[0].isdigit() for version in libraries().values())


def test_the_contents_of_files_and_checkpoints_that_a_specification_names_are_in_its_key(tmp_path):
    vector, checkpoint = tmp_path / "v.npy", tmp_path / "after"
    vector.write_text("1")
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    specification = {"rank1": {"direction": str(vector), "k": 1}, "other": [str(checkpoint), "delta", "\0"]}
    before = named_files(specification)
    assert set(before) == {str(vector), str(checkpoint)}
    vector.write_text("2")
    (checkpoint / "config.json").write_text("[]")
    after = named_files(specification)
    assert all(after[name] != before[name] for name in before)
