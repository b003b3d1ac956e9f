"""JSON files of checkpoints, whose errors name the file."""

import json
from pathlib import Path
from typing import Any

LARGEST = 2**27  # bytes; the index of the largest models has some ten million
LFS = b"version https://git-lfs"


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is too large, truncated, corrupt or holds something else.
    """
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size} bytes, too many for a checkpoint's JSON: download it again")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise ValueError(
                f"{path} is a pointer of git-lfs, not the file: run git lfs pull in {path.parent}"
            ) from error
        raise ValueError(f"{path} is truncated or corrupt; copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is truncated or corrupt; copy or download it again")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the small text that git-lfs leaves in place of a file that it has not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS
