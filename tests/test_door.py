"""`import weightgeom`: quick, and complete."""

import subprocess
import sys
from importlib import metadata

import pytest
from app import ROOT

import weightgeom as wg


def loaded(code: str) -> set[str]:
    """The modules that are there after some code has run in a process of its own."""
    code += "\nimport sys; print(*sys.modules, sep='\\n')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ended.stdout.split())


def test_the_import_loads_nothing_but_itself() -> None:
    modules = loaded("import weightgeom")
    assert {name for name in modules if name.startswith("weightgeom.")} == set()
    assert not modules & {"torch", "numpy", "pandas", "transformers", "importlib.metadata"}


def test_a_record_is_read_without_torch() -> None:
    assert "torch" not in loaded("from weightgeom import read_run")


def test_every_public_name_is_there_and_documented() -> None:
    assert set(wg.__all__) <= set(dir(wg)) and set(wg.PLACES) == set(wg.__all__) - {"__version__"}
    assert all(getattr(wg, name).__doc__ for name in wg.PLACES)
    assert wg.__version__ == metadata.version("weightgeom")
    with pytest.raises(AttributeError, match="module 'weightgeom' has no attribute 'mesure'"):
        _ = wg.mesure  # pyright: ignore[reportAttributeAccessIssue]


def test_no_module_hides_a_public_name() -> None:
    names = {path.stem for path in (ROOT / "weightgeom").iterdir()}
    assert not names & set(wg.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "weightgeom" / "py.typed").is_file()
