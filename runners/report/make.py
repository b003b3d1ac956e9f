"""The report on some experiments, from MLflow to a page on disk."""

import re
from collections.abc import Sequence
from pathlib import Path

from runners.disk import full_disk_explained
from runners.report.read import read


def directory_of(outputs: Path, names: Sequence[str]) -> Path:
    """Where the report on these experiments goes."""
    plain = (re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "_" for name in names)
    return outputs / "report" / "+".join(plain)


def make(names: Sequence[str], tracking_uri: str, outputs: Path) -> Path:
    """Write the report on the experiments, and return its page.

    Raises as `collect` does, and OSError if the disk does not take it.
    """
    study = read(names, tracking_uri)
    from runners.report.page import write

    directory = directory_of(outputs, names)
    with full_disk_explained(directory):
        return write(study, directory.absolute())
