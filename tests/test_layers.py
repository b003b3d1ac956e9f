"""The import contracts of pyproject.toml see what they are to see."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from app import ROOT


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code and its contracts."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("weightgeom", "runners"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def broken(project: Path, file: str, line: str) -> list[str]:
    """The contracts that a line at the end of a file breaks."""
    path = project / file
    source = path.read_text()
    path.write_text(f"{source}\n\ndef late():\n    {line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    ended = subprocess.run(command, cwd=project, capture_output=True, text=True, env={"PYTHONPATH": "."})
    path.write_text(source)
    return [row.partition(" BROKEN")[0] for row in ended.stdout.splitlines() if " BROKEN" in row]


@pytest.mark.parametrize(
    ("file", "line", "contracts"),
    [
        ("weightgeom/geometry/nulls.py", "import omegaconf", ["The library knows nothing of runs"]),
        ("weightgeom/geometry/nulls.py", "from matplotlib import pyplot", ["Only figures draw"]),
        (
            "weightgeom/data/text.py",
            "from weightgeom.data import world",
            ["Plug-ins know nothing of each other"],
        ),
        ("weightgeom/figures/base.py", "import torch.nn", ["Figures are drawn from tables"]),
        (
            "weightgeom/models/residual.py",
            "from weightgeom.probes import rsf",
            ["Layers of weightgeom", "No import circles"],
        ),
        (
            "weightgeom/geometry/subspace.py",
            "from weightgeom.geometry import nulls",
            ["No import circles"],
        ),
        (
            "runners/pipeline/experiment.py",
            "from hydra.utils import instantiate",
            ["Hydra is known where configurations are composed"],
        ),
        ("runners/tracking/sync.py", "import mlflow", ["MLflow is known where runs are published"]),
        (
            "runners/tracking/record.py",
            "from runners.launcher import jobs",
            ["Layers of runners", "No import circles"],
        ),
    ],
)
def test_a_forbidden_import_breaks_its_contract(
    project: Path, file: str, line: str, contracts: list[str]
) -> None:
    assert set(contracts) <= set(broken(project, file, line))


def test_to_import_the_application_loads_nothing_heavy() -> None:
    code = "import runpy, sys; runpy.run_path('run.py'); print(*sys.modules, sep='\\n')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.splitlines())
    heavy = {"torch", "transformers", "trl", "mlflow", "pandas", "matplotlib"}
    assert "hydra" in loaded and not loaded & heavy
