import sys
from pathlib import Path

import pytest

from runners.pipeline import fingerprint
from runners.pipeline.fingerprint import code_behind, libraries, package

SOURCES = {
    "__init__.py": '"""A planted package."""\n',
    "training.py": "from planted.checkpoints import save\n\n\ndef fit():\n    return save()\n",
    "checkpoints.py": 'def save():\n    """Save."""\n    return 1  # the start\n',
    "probe.py": "import planted.table\nfrom planted import checkpoints\n",
    "table.py": "UNIT = 'nats'\n",
    "figures.py": "COLOUR = 'grey'\n",
    "figures_causal.py": "COLOUR = 'grey'\n",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `planted` that stands in for ours."""
    directory = tmp_path / "planted"
    directory.mkdir()
    for name, source in SOURCES.items():
        (directory / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fingerprint, "PACKAGE", "planted")
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return directory


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


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
    (planted / changed).write_text((planted / changed).read_text() + "more = 1\n")
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


def test_what_only_draws_is_no_change_of_the_package(planted: Path) -> None:
    before = package()
    change(planted / "figures.py", "grey", "black")
    change(planted / "figures_causal.py", "grey", "black")
    assert package() == before


def test_the_fingerprint_of_our_own_code_is_16_hex_digits() -> None:
    for digits in (package(), code_behind("weightgeom.objectives.dpo", "weightgeom.training.fit")):
        assert len(digits) == 16 and int(digits, 16) >= 0


def test_the_libraries_that_decide_a_number_are_named_with_their_versions() -> None:
    assert set(libraries()) == {"torch", "transformers", "trl"}
    assert all(version[0].isdigit() for version in libraries().values())
