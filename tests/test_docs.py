"""The documentation agrees with the code."""

import importlib
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from app import ROOT
from networks import CONFIGS, MIXTURES

from weightgeom.check import CHECKS
from weightgeom.interfaces import MatrixFunction, Probe

GENERATED = runpy.run_path(str(ROOT / "docs/generate.py"))


@pytest.mark.parametrize("package", ["weightgeom", "runners"])
def test_the_picture_of_the_layers_is_drawn_from_the_contracts(package: str) -> None:
    drawn = GENERATED["layers_svg"](GENERATED["contracts"]()[package])
    assert (ROOT / f"docs/layers_{package}.svg").read_text() == drawn, "run: python docs/generate.py"
    modules = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(re.findall(r">(\w+)</text>", drawn)) == modules - {"__init__", "__pycache__"}


def test_the_page_of_architectures_has_every_map_and_every_network_and_every_claim_holds() -> None:
    page = (ROOT / "docs/reference/architectures.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (\d+) \| (\d+) of (\d+) \|", page, re.M)
    networks = Counter(config(50, 16).model_type for config in (CONFIGS | MIXTURES).values())
    whole = str(len(CHECKS))
    expected = [(name, str(number), whole, whole) for name, number in sorted(networks.items())]
    assert rows == expected, "run: python docs/generate.py"


def test_the_measurement_of_the_guide_is_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs/guides/extending.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", guide, re.S)
    (tmp_path / "measurement_of_the_guide.py").write_text(first + second)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("measurement_of_the_guide")
    assert isinstance(module.SpectralNorm(), MatrixFunction) and isinstance(module.Growth(), Probe)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "rotation_test" in (tmp_path / "site/reference/python/index.html").read_text()
    tutorial = (tmp_path / "site/tutorial/index.html").read_text()  # its cells were run
    assert tutorial.count("<img") >= 1 and "Traceback" not in tutorial


def test_the_readme_is_a_front_page_and_its_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 900
    assert [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not (ROOT / link).exists()] == []
