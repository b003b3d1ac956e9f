import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from runners.tracking.provenance import environment, provenance, uncommitted_diff


def git(repository: Path, *arguments: str) -> str:
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(repository), *user, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set when a git hook runs this
        monkeypatch.delenv(name, raising=False)
    git(tmp_path, "init")
    (tmp_path / "run.py").write_text("lr = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--no-verify", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout):
    tags = provenance(checkout)
    assert tags["git_commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert tags["git_dirty"] == "false"
    assert uncommitted_diff(checkout) == ""


def test_uncommitted_changes_set_git_dirty_and_appear_in_the_diff(checkout):
    (checkout / "run.py").write_text("lr = 2\nurl = 'https://me:hunter2@host'\n")
    (checkout / "new.py").write_text("")
    assert provenance(checkout)["git_dirty"] == "true"
    diff = uncommitted_diff(checkout)
    assert "-lr = 1\n+lr = 2\n" in diff
    assert "https://***@host" in diff
    assert diff.endswith("# untracked: new.py\n")


def test_git_variables_of_a_hook_in_another_repository_are_ignored(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    assert "git_commit" in provenance(checkout)


def test_outside_a_checkout_there_is_no_commit_and_no_diff(tmp_path):
    tags = provenance(tmp_path)
    assert "git_commit" not in tags
    assert "git_dirty" not in tags
    assert tags["host"]
    assert uncommitted_diff(tmp_path) == ""


def test_an_installed_package_has_its_version_and_not_the_commit_of_the_project_around_it(checkout):
    (checkout / "runners/conf").mkdir(parents=True)
    tags = provenance(checkout)
    assert "git_commit" not in tags
    assert tags["weightgeom_version"] == metadata.version("weightgeom")
    assert uncommitted_diff(checkout) == ""


def test_versions_are_those_installed(tmp_path):
    tags = provenance(tmp_path)
    assert tags["torch_version"] == metadata.version("torch")
    assert {"transformers_version", "trl_version", "mlflow_version", "python_version"} <= set(tags)


def test_the_slurm_job_id_is_a_tag_under_slurm_only(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "slurm_job_id" not in provenance(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert provenance(tmp_path)["slurm_job_id"] == "17"


def test_environment_lists_every_distribution_once_in_order():
    lines = environment().splitlines()
    assert f"filelock=={metadata.version('filelock')}" in lines
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
