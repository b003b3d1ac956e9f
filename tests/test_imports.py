"""Who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from app import ROOT

ROOMS = ("architectures", "data", "objectives", "probes", "interventions")
FIGURES = "weightgeom/figures"  # figures.py, and figures_<what>.py that build on it


def imports(source: str) -> set[str]:
    """Dotted names of all modules, and of what is taken from them, that a source imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(path: str) -> Iterator[str]:
    """What the file at `path` must not import."""
    place = path.removesuffix(".py").split("/")
    if place[0] == "weightgeom":
        yield from ("hydra", "omegaconf", "mlflow", "submitit", "runners")
        yield from ("torch", "weightgeom") if path.startswith(FIGURES) else ("matplotlib",)
        if len(place) > 2:
            yield from (f"weightgeom.{room}" for room in ROOMS)
    if place[0] == "runners" and place[1:] not in (["slurm"], ["jobs"]):
        yield "submitit"
    if place[0] == "runners":
        yield from () if place[1:] == ["launcher"] else ("hydra", "omegaconf")
        yield from () if place[1:] in (["tracking"], ["report"]) else ("mlflow",)


def within(name: str, package: str) -> bool:
    """Whether a dotted name is a package's or that of something in it."""
    return name == package or name.startswith(f"{package}.")


def allowed(path: str) -> list[str]:
    """What the file at `path` may import of what is forbidden it."""
    return ["weightgeom.figures.base"] if path.startswith(f"{FIGURES}_") else []


def violations(path: str, source: str) -> list[str]:
    """Imports of a file that it must not have."""
    return [
        f"{path} imports {name}"
        for name in sorted(imports(source))
        for banned in forbidden(path)
        if within(name, banned) and not any(within(name, one) for one in allowed(path))
    ]


FILES = sorted(path for room in ("weightgeom", "runners") for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_it_may(path: Path) -> None:
    assert not violations(str(path.relative_to(ROOT)), path.read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("weightgeom/stats.py", "import omegaconf"),
        ("weightgeom/stats.py", "def f():\n    from runners.pipeline.store import stage"),
        ("weightgeom/stats.py", "from matplotlib import pyplot"),
        ("weightgeom/figures.py", "from weightgeom.table import row"),
        ("weightgeom/figures.py", "import torch.nn"),
        ("weightgeom/figures_causal.py", "from weightgeom.causal.trials import measured"),
        ("weightgeom/figures_causal.py", "import torch.nn"),
        ("weightgeom/figures_uncertainty.py", "import torch"),
        ("weightgeom/figures_report.py", "from weightgeom.geometry.bootstrap import bootstrap_times"),
        ("weightgeom/figures.py", "from weightgeom.figures.study import ratios_by_setting"),
        ("runners/claims.py", "import mlflow"),
        ("weightgeom/data/text.py", "from weightgeom.objectives.ce import CE"),
        ("weightgeom/data/text.py", "from weightgeom.data import world"),
        ("weightgeom/architectures/llama.py", "from weightgeom import architectures"),
        ("runners/experiment.py", "from hydra.utils import instantiate"),
        ("runners/sync.py", "import mlflow"),
        ("runners/watch.py", "import submitit"),
    ],
)
def test_what_may_not_be_imported_is_seen(path: str, source: str) -> None:
    assert violations(path, source)


def test_the_exceptions_are_allowed() -> None:
    assert not violations("weightgeom/tiny.py", "from weightgeom.data.world import World")
    assert not violations("weightgeom/figures.py", "import matplotlib")
    assert not violations("weightgeom/figures_causal.py", "from weightgeom.figures.base import STYLE")
    assert not violations("runners/launcher.py", "import hydra")
    assert not violations("runners/tracking.py", "import mlflow")
    assert not violations("runners/slurm.py", "from submitit import SlurmExecutor")


def test_to_import_the_application_loads_nothing_heavy() -> None:
    code = "import runpy, sys; runpy.run_path('run.py'); print(*sys.modules, sep='\\n')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.splitlines())
    assert "hydra" in loaded and not loaded & {"torch", "transformers", "trl", "mlflow", "submitit"}
