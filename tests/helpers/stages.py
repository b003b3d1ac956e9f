"""Stages as a run has them, without its record: a directory for each specification, made once."""

from collections.abc import Callable, Mapping
from pathlib import Path


def made(home: Path) -> Callable[..., Path]:
    def stage(name: str, specification: Mapping[str, object], work: Callable, steps: int) -> Path:
        directory = home / name / str(abs(hash(str(specification))))
        if not directory.exists():
            directory.mkdir(parents=True)
            work(directory, lambda metrics, step: None)
        return directory

    return stage
