"""The tools that read the code are content with all of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from app import ROOT


@pytest.mark.parametrize(
    "arguments",
    [["ruff", "format", "--check"], ["ruff", "check"], ["pyright"], ["lint-imports"]],
    ids=" ".join,
)
def test_the_whole_project_is_clean(arguments: list[str]) -> None:
    tool = Path(sys.executable).with_name(arguments[0])
    ended = subprocess.run([tool, *arguments[1:]], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
