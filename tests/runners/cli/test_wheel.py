"""The wheel, installed away from the checkout, and the command `weightgeom` that it brings."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
from app import BEHAVIOUR, ROOT, WORLD, Ended, environment
from networks import save
from sweeps import TINY, directory, rows

PROJECT = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "run.py", "conf", "runners", "weightgeom")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with the libraries of this one, which lie behind it."""
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"
    source.mkdir()
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "local"))
        else:
            shutil.copy(ROOT / name, source)
    (source / "conf/local").mkdir()
    (source / "conf/local/default.yaml").write_text("seed: 7\n")  # a site's own
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    shutil.rmtree(source)
    home = place / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin/python"
    (wheel,) = place.glob("weightgeom-*.whl")
    # Without its own .pth files, in which an editable install would lead back to the checkout.
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the user's under git, whose commit is not that of our code."""
    place = tmp_path_factory.mktemp("project")
    git = ["git", "-C", str(place), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    return place


def weightgeom(site: Path, home: Path, *arguments: str) -> Ended:
    ended = subprocess.run(
        [str(site / "bin/weightgeom"), *arguments],
        cwd=home,
        env=environment(ONE_THREAD),
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def tags(record: Path) -> dict[str, str]:
    return json.loads((record / "run.json").read_text())["tags"]


def test_the_command_knows_the_choices_that_lie_within_the_package(site: Path, home: Path) -> None:
    code = "import runners, weightgeom; print(runners.__file__, weightgeom.__file__)"
    python = [str(site / "bin/python"), "-c", code]
    located = subprocess.run(python, cwd=home, env=environment(ONE_THREAD), capture_output=True, text=True)
    assert located.stdout.count(f"{site}/lib/") == 2
    listed = weightgeom(site, home, "list", "objectives").out
    choices = (ROOT / "conf/objective").rglob("*.yaml")
    assert len(listed.splitlines()) == len(list(choices))
    assert weightgeom(site, home, "--version").out == f"weightgeom {metadata.version('weightgeom')}\n"
    assert weightgeom(site, home, "run", "--cfg", "job").out.splitlines()[-1]
    (packages,) = site.glob("lib/python*/site-packages")
    assert (packages / "runners/report/report.html").is_file()
    assert not (packages / "runners/conf/local").exists()


def test_a_run_has_the_version_of_the_package_for_a_commit(site: Path, home: Path) -> None:
    ended = weightgeom(site, home, "run", *BEHAVIOUR, *WORLD)
    assert ended.code == 0, ended.err
    assert ended.record.is_relative_to(home / "outputs")
    assert tags(ended.record)["weightgeom_version"] == metadata.version("weightgeom")
    assert "git_commit" not in tags(ended.record)


def test_two_checkpoints_in_awkward_places_are_compared(site: Path, home: Path) -> None:
    before, after = (save("llama", home / name, seed) for seed, name in enumerate(["a=b, c", "d's"]))
    text = home / "text, 1.txt"
    text.write_text("\n\n".join(f"Document {n} tells of {n * n} things." for n in range(60)))
    ended = weightgeom(
        site, home, "compare", before.name, after.name, "--text", text.name, "--k", "4", "--out", "in, here",
        *("device=cpu", "probe.rsf.tokens=256", "probe.rsf.prompts=0", "probe=[rsf]"),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.record.is_relative_to(home / "in, here")
    table = pd.read_parquet(ended.record / "artifacts/tables/rsf.parquet")
    assert set(table["k"].dropna()) == {4} and "ratio" in set(table["quantity"])


def test_a_sweep_runs_the_code_of_the_package_and_reports(site: Path, home: Path) -> None:
    ended = weightgeom(site, home, "run", *TINY, "name=swept", "seed=0,1", "report=true", "-m")
    assert ended.code == 0, ended.err + ended.out
    sweep = directory(ended)
    assert f"reattach: weightgeom sweep wait {sweep}" in ended.out
    known = json.loads((sweep / "code/snapshot.json").read_text())
    assert known["commit"] == {"weightgeom_version": metadata.version("weightgeom")}
    assert (sweep / "code/runners/conf/config.yaml").is_file() and not (sweep / "code/run.py").exists()
    for job in ("0", "1"):
        assert tags(sweep / job / "record")["weightgeom_version"] == metadata.version("weightgeom")
    assert (home / "outputs/report/swept/index.html").is_file()
    shown = weightgeom(site, home, "sweep", "status", str(sweep))
    assert shown.code == 0, shown.err
    assert rows(shown) == {0: "COMPLETED", 1: "COMPLETED"}
    assert "nothing to resubmit" in weightgeom(site, home, "sweep", "resubmit", str(sweep)).out
    assert "nothing new" in weightgeom(site, home, "sync").out
