"""A table measured in pieces, by several workers, against that of one process."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import pandas as pd
import psutil
import pytest
import small
import torch
from app import Ended, run
from networks import save
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file, save_file

from runners.compose import workers_of
from runners.pipeline.logged_stages import Stages
from runners.pipeline.measurements import Measured
from runners.pipeline.pieces import steps_of
from weightgeom.declarations import ProbeDeclaration
from weightgeom.interfaces import Probe, Setting
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.probes.rsf import RSF
from weightgeom.table import Row
from weightgeom.training.config import Training
from weightgeom.trajectory import Base, Trajectory

PROBE: Any = RSF(
    increments=True, tokens=256, length=16, prompts=0, resamples=4
)  # reads the checkpoint before


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    home = tmp_path_factory.mktemp("chain")
    return {step: save("llama", home / f"step-{step}", seed=step) for step in range(5)}


def measured(outputs: Path, steps: dict[int, Path]) -> Measured:
    trajectory = Trajectory("chain", steps)
    base = Base(steps[0], "base", trajectory)

    def stages(prefix: str, code: str) -> Stages:
        return Stages(outputs, None, prefix, code)

    return Measured(stages, 0, "cpu", None, Training(), base, trajectory, "own", small.WORLD.examples())


@dataclass(frozen=True)
class Undeclared:
    """A probe that may need any measurement of the checkpoint before, and ends at one of its own."""

    probe: RSF

    @property
    def declaration(self) -> ProbeDeclaration:
        return ProbeDeclaration("ratio")

    def check(self, architecture: Architecture) -> None:
        pass

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        assert setting.before is None
        return self.probe.measurement(setting)


def test_every_step_is_in_one_piece_and_pieces_differ_by_at_most_one_step() -> None:
    for count, workers in ((5, 2), (5, 5), (3, 7), (154, 16)):
        pieces = [steps_of(range(count), number, workers) for number in range(workers)]
        assert [step for piece in pieces for step in piece] == list(range(count))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("probe", [PROBE, Undeclared(PROBE)], ids=["divisible", "undeclared"])
@pytest.mark.parametrize("workers", [2, 5])
def test_a_table_of_pieces_is_that_of_one_process_bit_for_bit(
    tmp_path: Path, steps: dict[int, Path], probe: Probe, workers: int
) -> None:
    whole = measured(tmp_path / "whole", steps).table("rsf", probe)
    pieces = [steps_of(list(steps), number, workers) for number in range(workers)]
    for piece in reversed(pieces):  # in any order, each as in a process of its own
        measured(tmp_path / "cut", steps).piece("rsf", probe, piece)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut/pieces").rglob("*")}
    merged = measured(tmp_path / "cut", steps).table("rsf", probe, pieces)
    assert_frame_equal(merged, whole, check_exact=True)
    (one,), (other,) = ((tmp_path / outputs / "rsf").glob("*/rsf.parquet") for outputs in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    for piece in pieces:  # again, which changes nothing
        measured(tmp_path / "cut", steps).piece("rsf", probe, piece)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cut/pieces").rglob("*")}
    assert len(list((tmp_path / "cut/shared").glob("*/DONE"))) == 1  # one set of reference subspaces


def test_a_missing_or_damaged_piece_is_measured_where_the_table_is_made(
    tmp_path: Path, steps: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    whole = measured(tmp_path / "whole", steps).table("rsf", PROBE)
    piece = measured(tmp_path / "cut", steps).piece("rsf", PROBE, [0, 1, 2])
    kept = piece / "checkpoint-1.rows"
    kept.write_bytes(kept.read_bytes() + b" ")
    merged = measured(tmp_path / "cut", steps).table("rsf", PROBE, [[0, 1, 2], [3, 4]])
    assert "making it again" in caplog.text
    assert_frame_equal(merged, whole, check_exact=True)


def test_a_revision_with_values_that_are_not_finite_is_refused_where_it_is_measured(
    tmp_path: Path, steps: dict[int, Path]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(steps[1], bad)
    weights = load_file(bad / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    damaged = measured(tmp_path / "outputs", {**steps, 1: bad})
    damaged.piece("rsf", PROBE, [2, 3, 4])
    with pytest.raises(ValueError, match=rf"model\.norm\.weight of {bad} has values that are not finite"):
        damaged.piece("rsf", PROBE, [0, 1])


CHAIN = [
    *("model=chain/own", "objective=none", "probe=[rsf]", "probe.rsf.tokens=256", "probe.rsf.resamples=4"),
    *("device=cpu", "+data.documents=60", "+data.pairs=24", "+data.heldout=8"),
]


@pytest.mark.slow
def test_workers_of_a_chain_make_the_tables_of_one_process(tmp_path: Path, steps: dict[int, Path]) -> None:
    stages = ", ".join(f"s{step}: {place}" for step, place in list(steps.items())[:3])
    chain = [*CHAIN, f"model.stages={{{stages}}}"]

    def ran(outputs: str, *more: str) -> Ended:
        ended = run(tmp_path, *chain, f"outputs={outputs}", *more)
        assert ended.code == 0, ended.err
        return ended

    def tables(ended: Ended) -> dict[str, pd.DataFrame]:
        found = (ended.record / "artifacts/tables").glob("*.parquet")
        return {path.stem: pd.read_parquet(path) for path in found}

    whole = tables(ran("whole"))
    assert {"rsf", "rsf_stages", "stages"} <= whole.keys()
    part = ran("jobs", "probe.workers=2", "probe.worker=1")
    assert "piece 2 of 2 is measured" in part.out
    assert not tables(part)
    merged = ran("jobs", "probe.workers=2")  # which measures the other piece in a process of its own
    assert "1 of 2 pieces are still to be measured" in merged.err + merged.out
    for name, table in tables(merged).items():
        assert_frame_equal(table, whole[name], check_exact=True)
    assert len(list((tmp_path / "jobs/pieces").glob("*/DONE"))) == 2


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_a_sentence_and_the_next_one_goes_on_behind_it(
    tmp_path: Path, steps: dict[int, Path]
) -> None:
    stages = ", ".join(f"s{step}: {place}" for step, place in steps.items())
    chain = [*CHAIN, f"model.stages={{{stages}}}"]
    whole = run(tmp_path, *chain, "outputs=whole")
    with ThreadPoolExecutor() as background:
        ending = background.submit(run, tmp_path, *chain, "outputs=cut", "probe.workers=2")
        while not list(tmp_path.glob("cut/pieces/*/checkpoint-*.rows")) and not ending.done():
            sleep(0.01)
        for process in workers_in(tmp_path)[:1]:
            process.kill()
        ended = ending.result()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/pieces/*/checkpoint-*.rows")}
    assert ended.code == 1 and kept
    assert ended.errors == [
        "error: a process that measures a piece was killed, as by a lack of memory: the same command goes on"
        " behind the checkpoints that are measured; give it a smaller probe.workers"
    ]
    assert not workers_in(tmp_path)
    again = run(tmp_path, *chain, "outputs=cut", "probe.workers=2")
    assert again.code == 0, again.err
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in kept if path.exists()}.items()
    tables = [
        {path.name: path.read_bytes() for path in (ended.record / "artifacts/tables").glob("*.csv")}
        for ended in (whole, again)
    ]
    assert tables[0] and tables[0] == tables[1]


def workers_in(directory: Path) -> list[psutil.Process]:
    """The processes of workers of a run in `directory`."""
    workers = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any("spawn_main" in part for part in process.cmdline()) and process.cwd() == str(directory):
                workers.append(process)
    return workers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, r"probe\.workers must be 1 or more, got 0"),
        ({"workers": True}, r"probe\.workers must be 1 or more, got True"),
        ({"worker": 0}, r"set probe\.workers to their number"),
        ({"workers": 2, "worker": 2}, r"probe\.worker must be null or 0 to 1, as probe\.workers=2, got 2"),
    ],
)
def test_workers_that_cannot_be_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workers_of(given)
