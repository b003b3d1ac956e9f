"""A run's record on disk, read back: its configuration, its tables and its figures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


MEND = "bring it back from a copy, or run again"


@dataclass(frozen=True)
class Picture:
    """A figure of a run as a PNG file, which a notebook shows."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True, eq=False)
class Run:
    """A run as its record has it.

    `status` is FINISHED, FAILED, KILLED, RUNNING or SCHEDULED; `config` the resolved configuration, secrets
    masked; `tables` are by name, such as `rsf`, with the columns of `weightgeom.table.COLUMNS`, or those of
    their own where they sum up claims. Of a run that has not finished there may be none.
    """

    directory: Path
    status: str
    config: Mapping[str, Any]
    tables: "Mapping[str, pd.DataFrame]"

    @property
    def figures(self) -> list[str]:
        """The names of its figures."""
        return sorted(path.stem for path in (self.directory / "artifacts" / "figures").glob("*.png"))

    def figure(self, name: str) -> Picture:
        """One figure, such as `ratio_by_layer`; its PDF is in the PNG's directory.

        Raises:
            KeyError: if the run has none of this name, naming those that it has.
        """
        if name not in self.figures:
            there = ", ".join(self.figures) or "none"
            raise KeyError(f"no figure {name!r} in {self.directory}; its figures are {there}")
        return Picture(self.directory / "artifacts" / "figures" / f"{name}.png")


def read_run(directory: str | Path) -> Run:
    """The run whose job, or record, lies in `directory`, which is only read.

    Examples:
        >>> run = read_run("outputs/jobs/2026-01-31/12-00-00.000000")
        >>> run.config["objective"]["beta"], run.tables["rsf"], run.figure("ratio_by_layer")

    Raises:
        FileNotFoundError: if there is no record.
        ValueError: if the record is damaged, or that of a sweep, naming its first run.
    """
    record = _record(Path(directory).expanduser())
    if _entry(record / "run.json", "kind") == "sweep":
        runs = sorted(path.parents[1] for path in record.parent.glob("*/record/run.json"))
        mend = (
            f"give one of its {len(runs)} runs, such as {runs[0]}" if runs else "none of its runs has begun"
        )
        raise ValueError(f"{directory} is a sweep: {mend}")
    artifacts = record / "artifacts"
    config = artifacts / "config.yaml"
    return Run(
        record,
        _entry(record / "status.json", "status"),
        _config(config) if config.is_file() else {},
        _tables(artifacts / "tables"),
    )


def _record(directory: Path) -> Path:
    for record in (directory, directory / "record"):
        if (record / "run.json").is_file():
            return record
    raise FileNotFoundError(
        f"there is no record of a run in {directory}: give the directory that a run names at its end, such as"
        " outputs/jobs/DATE/TIME, or of a sweep outputs/jobs/DATE/TIME/0"
    )


def _tables(directory: Path) -> "dict[str, pd.DataFrame]":
    import pandas as pd

    from weightgeom.table import joined, upgraded

    tables: dict[str, pd.DataFrame] = {}
    for path in (*directory.glob("*.csv"), *directory.glob("*.parquet")):
        try:
            is_csv = path.suffix == ".csv"
            tables[path.stem] = pd.read_csv(path) if is_csv else upgraded(pd.read_parquet(path))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): {MEND}") from error
    return dict(sorted(joined(tables).items()))


def _entry(path: Path, key: str) -> str:
    """An entry of a JSON file of the record."""
    try:
        return str(json.loads(path.read_bytes())[key])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {MEND}") from error


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged ({problem}): {MEND}") from error
    return config
