import subprocess
import sys
from pathlib import Path

import pytest

from runners.launcher.snapshot import changed_since, digest, python_of, take_snapshot
from runners.tracking.provenance import commit, provenance, uncommitted_diff


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name in (
        "run.py",
        "runners/__init__.py",
        "weightgeom/a.py",
        "conf/config.yaml",
        "conf/local/mine.yaml",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "weightgeom/notes.txt").write_text("no code")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    return root


def test_a_snapshot_is_the_code_as_it_is_and_knows_its_commit(repository, tmp_path):
    (repository / "weightgeom/a.py").write_text("changed = 1\n")
    copy = tmp_path / "copy"
    take_snapshot(repository, copy)
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert found == {
        "run.py",
        "runners/__init__.py",
        "weightgeom/a.py",
        "conf/config.yaml",
        "snapshot.json",
    }
    assert (copy / "weightgeom/a.py").read_text() == "changed = 1\n"
    assert digest(copy) == digest(repository)
    assert commit(copy) == commit(repository) and commit(copy)["git_dirty"] == "true"
    assert provenance(copy)["git_commit"] == provenance(repository)["git_commit"]
    assert "+changed = 1" in uncommitted_diff(copy)


def test_a_change_since_is_told_with_the_commits(repository, tmp_path):
    take_snapshot(repository, tmp_path / "copy")
    assert changed_since(repository, tmp_path / "copy") == ""
    (repository / "run.py").write_text("changed = 1\n")
    head = commit(repository)["git_commit"][:12]
    told = changed_since(repository, tmp_path / "copy")
    assert f"it was {head}, and {repository} is {head} with changes" in told


def test_python_takes_the_code_of_the_snapshot_and_not_of_the_working_directory(repository, tmp_path):
    take_snapshot(repository, tmp_path / "copy")
    code = "import weightgeom.a; print(weightgeom.a.__file__)"
    (tmp_path / "copy/weightgeom/__init__.py").touch()
    (repository / "weightgeom/__init__.py").touch()
    ended = subprocess.run(
        [*python_of(tmp_path / "copy"), "-c", code],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == f"{tmp_path}/copy/weightgeom/a.py"
    assert python_of(tmp_path / "copy")[-1] == sys.executable
