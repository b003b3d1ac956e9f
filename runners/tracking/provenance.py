"""The provenance of a result: commit, uncommitted changes, host and library versions."""

import json
import os
import platform
import socket
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from runners.tracking.redaction import redacted_text

LIBRARIES = ("torch", "transformers", "trl", "mlflow")
DISTRIBUTION = "weightgeom"
SNAPSHOT = "snapshot.json"  # in a copy of the code: its origin and the git state there


def provenance(repository: Path) -> dict[str, str]:
    """The provenance of a run as tags; unknown ones (no git, no SLURM) are left out.

    `git_commit` and `git_dirty` (true, false), or `weightgeom_version`; `host`, `python_version`,
    `torch_version` and those of other libraries, `slurm_job_id`.
    """
    tags = {"host": socket.gethostname(), "python_version": platform.python_version()}
    tags |= code_version(repository)
    installed = _installed()
    tags |= {f"{name}_version": installed[name] for name in LIBRARIES if name in installed}
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm_job_id"] = job
    return tags


def code_version(repository: Path) -> dict[str, str]:
    """`git_commit` and `git_dirty` of a checkout, or `weightgeom_version` of an installed package.

    For a copy, those of its origin; {} for a checkout without git.
    """
    if (copied := _copied(repository)) is not None:
        return copied["commit"]
    if is_installed(repository):
        return {f"{DISTRIBUTION}_version": metadata.version(DISTRIBUTION)}
    head = _git(repository, "rev-parse", "HEAD").strip()
    dirty = bool(head and _git(repository, "status", "--porcelain").strip())
    return {"git_commit": head, "git_dirty": str(dirty).lower()} if head else {}


def is_installed(repository: Path) -> bool:
    """Whether `repository` is where pip puts packages, which then have the choices within: no checkout.

    The commit of a repository around it, such as that of the user's own project, is not that of our code.
    """
    return (repository / "runners/conf").is_dir()


def uncommitted_diff(repository: Path) -> str:
    """The output of `git diff HEAD` and the names of untracked files; empty for a clean checkout.

    Passwords in URIs and known kinds of tokens are masked, because the text is published with the run.
    """
    if (copied := _copied(repository)) is not None:
        return copied["diff"]
    if is_installed(repository):
        return ""
    diff = _git(repository, "diff", "HEAD", "--no-color", "--no-ext-diff")
    names = _git(repository, "ls-files", "--others", "--exclude-standard").splitlines()
    return redacted_text(diff + "".join(f"# untracked: {name}\n" for name in names))


def environment() -> str:
    """Every installed distribution as a sorted `name==version` line."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(_installed().items()))


def _copied(repository: Path) -> dict[str, Any] | None:
    path = repository / SNAPSHOT
    return json.loads(path.read_text()) if path.exists() else None


@cache  # to read all of them takes long
def _installed() -> dict[str, str]:
    # A distribution with broken metadata has no name, contrary to its type annotation.
    described = [distribution.metadata for distribution in metadata.distributions()]
    return {name.lower(): fields["Version"] for fields in described if (name := fields["Name"])}


def _git(repository: Path, *arguments: str) -> str:
    # Within a git hook these variables point to the repository of the hook, not to `repository`.
    hook = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    try:
        return subprocess.run(
            ["git", "-C", str(repository), *arguments],
            env={name: value for name, value in os.environ.items() if name not in hook},
            capture_output=True,
            check=True,
            timeout=60,
            encoding="utf-8",
            errors="replace",
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet
        return ""
