import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from app import ROOT, environment
from lab import change, write_lab

from runners import modules
from runners.modules import find, modules_of, own_places, reached, targets, travelling
from runners.pipeline.measurements import plain
from weightgeom.objectives.ce import CE


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A process reads a module once; here one stands for many."""
    find.cache_clear()
    yield
    find.cache_clear()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return write_lab(tmp_path)


@dataclass(frozen=True)
class Outer:
    """An object with others in its fields."""

    inner: Any
    several: list[Any] = field(default_factory=list)
    named: dict[str, Any] = field(default_factory=dict)


def test_the_modules_of_an_object_are_those_of_all_objects_in_its_fields() -> None:
    here = Outer.__module__
    assert modules_of(Outer(CE())) == [here, "weightgeom.objectives.ce"]
    assert modules_of({"a": Outer(1)}, None, "text") == [here]
    assert modules_of(Outer(None, [CE()], {"x": (CE(),)})) == [here, "weightgeom.objectives.ce"]
    assert modules_of(Outer(partial(plain, CE()))) == [
        here,
        "runners.pipeline.measurements",
        "weightgeom.objectives.ce",
    ]
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    assert modules_of(optimizer) == ["torch.optim.adamw"]
    assert modules_of(torch.nn.Linear(2, 2)) == ["torch.nn.modules.linear"]  # and nothing within it


def test_a_module_is_found_without_being_run(lab: Path) -> None:
    (lab / "mylab/loud.py").write_text("raise RuntimeError('it runs')\n")
    (lab / "spaces/inner").mkdir(parents=True)
    (lab / "spaces/inner/leaf.py").touch()
    places = {name: find(name) for name in ("mylab.loud", "loose", "spaces.inner.leaf", "mylab")}
    paths = {name: module.path.relative_to(lab) for name, module in places.items() if module and module.path}
    assert {name: str(path) for name, path in paths.items()} == {
        "mylab.loud": "mylab/loud.py",
        "loose": "loose.py",
        "spaces.inner.leaf": "spaces/inner/leaf.py",
        "mylab": "mylab/__init__.py",
    }
    assert not {"mylab", "loose", "spaces"} & set(sys.modules)


def test_what_is_installed_or_comes_with_python_is_a_librarys(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "sys", "torch.optim", "pydantic.fields", "nothing_of_this_name"):
        assert find(name) is None
    (lab / "site-packages/installed").mkdir(parents=True)
    (lab / "site-packages/installed/__init__.py").touch()
    monkeypatch.syspath_prepend(lab / "site-packages")
    assert find("installed") is None and find("installed.part") is None
    assert str(lab) in own_places() and str(lab / "site-packages") not in own_places()
    assert not any("site-packages" in place for place in own_places())


def test_the_house_is_read_even_where_it_is_installed(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "HOUSE", "installed")
    (lab / "site-packages/installed").mkdir(parents=True)
    for name in ("__init__", "part"):
        (lab / f"site-packages/installed/{name}.py").touch()
    monkeypatch.syspath_prepend(lab / "site-packages")
    assert find("installed.part") is not None


def test_only_a_running_module_takes_in_the_further_imports_of_its_package(lab: Path) -> None:
    def own(running: bool) -> set[str]:
        return {name for name in reached("mylab.probe", running=running) if not modules.is_house(name)}

    assert own(running=False) == {"mylab.probe", "mylab.scaling", "loose"}
    assert own(running=True) == {*own(running=False), "mylab", "mylab.unrelated"}
    assert "weightgeom.table" in reached("mylab.probe")


def test_the_targets_of_a_configuration_are_found_at_any_depth(lab: Path) -> None:
    tree = {
        "probe": {"norm": {"_target_": "mylab.probe.Norm", "loss": [{"_target_": "loose.size"}]}},
        "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True},
        "objective": {"_target_": "weightgeom.objectives.ce.CE"},
    }
    assert list(targets(tree)) == ["mylab.probe", "loose", "weightgeom.objectives.ce"]
    assert travelling(tree, CE()) == ["mylab.probe", "loose"]


def test_code_that_is_in_no_file_is_refused(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = type("Typed", (), {"__module__": "__main__"})()
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    message = r"the code of module __main__ cannot be read \(a notebook .* has no file\): save it as a \.py"
    with pytest.raises(ValueError, match=message):
        modules_of(typed)


def test_code_in_an_archive_is_refused(lab: Path) -> None:
    with zipfile.ZipFile(lab / "packed.zip", "w") as archive:
        archive.writestr("packed.py", "SIZE = 1\n")
    code = "from runners.modules import find; find('packed')"
    path = f"{lab / 'packed.zip'}:{ROOT}"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment({"PYTHONPATH": path}), capture_output=True, text=True
    )
    message = (
        f"ValueError: the code of module packed cannot be read ({lab}/packed.zip/packed.py is not a file)"
    )
    assert ended.returncode == 1 and message in ended.stderr


def test_a_script_is_its_file(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(lab / "loose.py"), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    module = find("__main__")
    assert module is not None and module.path == lab / "loose.py"


def test_a_file_that_is_not_python_is_named_with_its_line(lab: Path) -> None:
    change(lab / "loose.py", "return", "retrun")
    with pytest.raises(ValueError, match=r"loose\.py line 2 is not valid Python: invalid syntax"):
        reached("mylab.probe")


def test_a_compiled_module_is_its_bytes(lab: Path) -> None:
    path = lab / f"fast{next(ending for ending in modules.CODE if ending.endswith('.so'))}"
    path.write_bytes(b"1")
    codes = []
    for contents in (b"1", b"2"):
        path.write_bytes(contents)
        find.cache_clear()
        module = find("fast")
        assert module is not None and not module.imports
        codes.append(module.code)
    assert len(set(codes)) == 2
