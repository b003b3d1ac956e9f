import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from lab import SOURCES, change, write_lab

from runners.launcher.snapshot import changed_since, digest, python_of, take_snapshot
from runners.modules import find
from runners.tracking.provenance import code_version, provenance, uncommitted_diff


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


def test_a_snapshot_holds_the_current_code_and_its_commit(repository, tmp_path):
    (repository / "weightgeom/a.py").write_text("changed = 1\n")
    copy = tmp_path / "copy"
    take_snapshot(repository, copy)
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files == {
        "run.py",
        "runners/__init__.py",
        "weightgeom/a.py",
        "conf/config.yaml",
        "snapshot.json",
    }
    assert (copy / "weightgeom/a.py").read_text() == "changed = 1\n"
    assert digest(copy) == digest(repository)
    assert code_version(copy) == code_version(repository) and code_version(copy)["git_dirty"] == "true"
    assert provenance(copy)["git_commit"] == provenance(repository)["git_commit"]
    assert "+changed = 1" in uncommitted_diff(copy)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path / "lab")
    find.cache_clear()
    yield write_lab(tmp_path / "lab")
    find.cache_clear()


def test_the_users_own_modules_go_with_it_and_import_by_the_same_names(repository, lab, tmp_path):
    (lab / "mylab/deep").mkdir()
    (lab / "mylab/deep/made_up.py").touch()  # imported by a name that nothing but a run can know
    (lab / "mylab/notes.txt").touch()
    copy = tmp_path / "copy"
    take_snapshot(repository, copy, ["mylab.probe", "weightgeom.a"])
    package = [name for name in SOURCES if name.startswith("mylab/")]
    expected = {
        f"modules/{name}": str(lab / name) for name in [*package, "mylab/deep/made_up.py", "loose.py"]
    }
    assert json.loads((copy / "snapshot.json").read_text())["modules"] == expected
    files = {str(path.relative_to(copy)) for path in (copy / "modules").rglob("*") if path.is_file()}
    assert files == set(expected)
    assert digest(copy) == digest(repository)
    ended = subprocess.run(
        [*python_of(copy), "-c", "import loose, mylab.scaling as m; print(loose.__file__, m.__file__)"],
        cwd=lab,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == [f"{copy}/modules/loose.py", f"{copy}/modules/mylab/scaling.py"]


def test_of_a_package_without_an_init_the_modules_that_are_reached_go(repository, lab, tmp_path):
    (lab / "mylab/__init__.py").unlink()
    take_snapshot(repository, tmp_path / "copy", ["mylab.probe"])
    known = json.loads((tmp_path / "copy/snapshot.json").read_text())["modules"]
    assert set(known) == {"modules/mylab/probe.py", "modules/mylab/scaling.py", "modules/loose.py"}


def test_a_change_of_the_users_own_since_is_told_with_the_file(repository, lab, tmp_path):
    take_snapshot(repository, tmp_path / "copy", ["mylab.probe"])
    assert changed_since(repository, tmp_path / "copy") == ""
    change(lab / "mylab/scaling.py", "scale * value", "value")
    message = f"the code has changed since: {lab}/mylab/scaling.py is not what it was"
    assert changed_since(repository, tmp_path / "copy") == message
    (lab / "mylab/scaling.py").unlink()
    assert changed_since(repository, tmp_path / "copy") == message


def test_of_an_installed_package_the_two_packages_go_with_the_choices_inside(repository, tmp_path):
    (repository / "conf").rename(repository / "runners/conf")
    (repository / "conf").mkdir()
    (repository / "conf/config.yaml").write_text("of: another distribution\n")
    copy = tmp_path / "copy"
    take_snapshot(repository, copy)
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files == {"runners/__init__.py", "runners/conf/config.yaml", "weightgeom/a.py", "snapshot.json"}
    assert provenance(copy)["weightgeom_version"] == metadata.version("weightgeom")
    (repository / "weightgeom/a.py").write_text("changed = 1\n")
    assert f"it was {metadata.version('weightgeom')}, and" in changed_since(repository, copy)


def test_the_sentence_about_changed_code_names_both_commits(repository, tmp_path):
    take_snapshot(repository, tmp_path / "copy")
    assert changed_since(repository, tmp_path / "copy") == ""
    (repository / "run.py").write_text("changed = 1\n")
    head = code_version(repository)["git_commit"][:12]
    sentence = changed_since(repository, tmp_path / "copy")
    assert f"it was {head}, and {repository} is {head} with changes" in sentence


def test_python_imports_the_code_of_the_snapshot_rather_than_of_the_working_directory(repository, tmp_path):
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


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "torn", "[" * 100_000, "{}", '{"digest": "1"}', '{"digest": "1", "commit": "2"}'),
        *('{"digest": "1", "commit": {"git_commit": 2}}', '{"digest": "1", "commit": {}, "modules": [3]}'),
        '{"digest": "1", "commit": {}, "modules": {"a": 3}}',
    ],
)
def test_a_copy_whose_description_is_damaged_or_missing_is_named_with_the_way_out(
    content, repository, tmp_path
):
    copy = tmp_path / "copy"
    take_snapshot(repository, copy)
    (copy / "snapshot.json").write_text(content)
    with pytest.raises(ValueError, match=f"{copy}/snapshot.json is damaged .*: .* resubmit --new-code"):
        changed_since(repository, copy)
    (copy / "snapshot.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing: .* resubmit --new-code"):
        changed_since(repository, copy)
