"""Kills runs and sweeps at random moments, goes on with them, and compares the end with undisturbed ones.

    python benchmarks/kills.py DIRECTORY [KILLS] [SEED]

A third of the kills hit a run in outputs of its own, which also makes its store; a third the launcher, the
supervisor or a job of a local sweep of two; a third its `resubmit`. Afterwards the same command (a run) or
`resubmit` (a sweep) goes on until all is done. Prints a line for each, and exits with 1 if tables differ,
points are in a record twice, a job completes twice, or MLflow still has a run RUNNING or SCHEDULED after
`sync`.
"""

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = (
    "model.d_model=32 model.d_mlp=64 model.layers=2 model.heads=2 model.pretraining.steps=12"
    " model.pretraining.batch_size=4 model.pretraining.max_length=32 training.steps=12 training.batch_size=4"
    " training.max_length=48 training.log_every=1 training.save_every=3 probe.rsf.tokens=256 device=cpu"
    " probe.behaviour.tokens=256 +data.documents=60 +data.pairs=24 +data.heldout=8 name=kills"
).split()
SWEEP = ["objective=dpo,ce", "-m"]
LAUNCHER = [sys.executable, "-m", "runners.launcher"]
VICTIMS = ("run.py", "local_main", "launcher.jobs")


def environment() -> dict[str, str]:
    """One thread, no network, and this checkout."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | own


def started(home: Path, command: list[str]) -> subprocess.Popen[str]:
    """The command in a session of its own."""
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command, cwd=home, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def ended(home: Path, command: list[str]) -> tuple[int, str]:
    """Exit code and output."""
    process = started(home, command)
    out, _ = process.communicate(timeout=1800)
    return process.returncode, out


def run(*more: str) -> list[str]:
    """The command of a run."""
    return [sys.executable, str(ROOT / "run.py"), *SMALL, *more]


def tables(record: Path) -> dict[str, str]:
    """Digests of a record's tables."""
    paths = sorted((record / "artifacts/tables").glob("*.csv"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def newest(home: Path) -> Path:
    """The record of the last run."""
    return max(home.glob("outputs/jobs/*/*/record"), key=lambda path: path.parent)


def processes(home: Path) -> Iterator[tuple[int, str]]:
    """Those that work in `home`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_text().replace("\0", " ")
            if str(home) in line or os.readlink(path / "cwd") == str(home):
                yield int(path.name), line
        except OSError:
            continue


def faults(home: Path, records: list[Path]) -> Iterator[str]:
    """The faults of runs that have ended: repeated points, repeated jobs, unfinished runs in MLflow."""
    for record in records:
        lines = (record / "metrics.jsonl").read_text().splitlines()
        points = [(point["key"], point["step"]) for point in map(json.loads, lines)]
        if len(points) != len(set(points)):
            yield f"{len(points) - len(set(points))} points twice"
        events = record.parent / "events.jsonl"
        if events.exists() and events.read_text().count('"state": "COMPLETED"') != 1:
            yield "a job did not complete once"
    with sqlite3.connect(f"file:{home}/outputs/mlflow.db?mode=ro", uri=True) as store:
        counts = dict(store.execute("select status, count(*) from runs group by status").fetchall())
    if set(counts) & {"RUNNING", "SCHEDULED"}:
        yield f"MLflow has {counts}"


def synced(home: Path) -> list[str]:
    """Publish all records; the end of the output if that fails."""
    code, out = ended(home, [sys.executable, "-m", "runners.tracking", "sync"])
    return [f"sync ended with {code}: {out[-500:]}"] if code else []


def of_run(home: Path, moment: float, expected: dict[str, str]) -> list[str]:
    """Kill a run after `moment` seconds, and run it again."""
    process = started(home, run())
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, out = ended(home, run())
    if code:
        return [out[-500:]]
    if unsynced := synced(home):
        return unsynced
    return [*faults(home, [newest(home)]), *(["tables differ"] if tables(newest(home)) != expected else [])]


def of_sweep(home: Path, moment: float, victim: str, expected: list[dict[str, str]]) -> list[str]:
    """Kill the `victim` among the processes of a sweep, or of its `resubmit`, and submit it again."""
    process = started(home, run(*SWEEP))
    time.sleep(moment)
    killed(home, "launcher.jobs" if victim == "resubmit" else victim)
    sweeps = list(home.glob("outputs/jobs/*/*/sweep.json"))
    if not sweeps:  # nothing was submitted yet
        killed(home, "run.py")
        process.communicate()
        code, out = ended(home, run(*SWEEP))
        if code:
            return [out[-500:]]
        (path,) = home.glob("outputs/jobs/*/*/sweep.json")
        return verdict(home, path.parent, expected)
    process.communicate()
    sweep = sweeps[0].parent
    if victim == "resubmit":
        again = started(home, [*LAUNCHER, "resubmit", str(sweep)])
        time.sleep(moment / 4)
        os.killpg(again.pid, signal.SIGKILL)
        again.communicate()
    for _ in range(5):
        ended(home, [*LAUNCHER, "wait", str(sweep)])
        if not ended(home, [*LAUNCHER, "resubmit", str(sweep)])[0]:
            ended(home, [*LAUNCHER, "wait", str(sweep)])
        if not ended(home, [*LAUNCHER, "status", str(sweep)])[0]:
            break
    return verdict(home, sweep, expected)


def killed(home: Path, victim: str) -> None:
    """SIGKILL one process of this kind, if there is one."""
    for pid, line in processes(home):
        if victim in line:
            os.kill(pid, signal.SIGKILL)
            return


def verdict(home: Path, sweep: Path, expected: list[dict[str, str]]) -> list[str]:
    """The faults of a sweep that has ended, and the jobs whose tables differ from the expected ones."""
    if unsynced := synced(home):
        return unsynced
    records = [sweep / number / "record" for number in "01"]
    differ = [f"tables of {n} differ" for n, record in enumerate(records) if tables(record) != expected[n]]
    return [*faults(home, records), *differ]


def main(directory: Path, kills: int, seed: int) -> int:
    """Print what every kill leads to; the exit code."""
    began = time.monotonic()
    code, out = ended(directory / "plain", run())
    assert code == 0, out
    alone, whole = tables(newest(directory / "plain")), time.monotonic() - began
    began = time.monotonic()
    code, out = ended(directory / "sweep", run(*SWEEP))
    assert code == 0, out
    (path,) = (directory / "sweep").glob("outputs/jobs/*/*/sweep.json")
    each, both = [tables(path.parent / n / "record") for n in "01"], time.monotonic() - began
    rng = random.Random(seed)

    def kill(number: int) -> list[str]:
        home, share = directory / str(number), rng.random()
        if number % 3 == 0:
            what, differences = "run", of_run(home, share * whole, alone)
        else:
            what = "resubmit" if number % 3 == 1 else VICTIMS[number // 3 % 3]
            differences = of_sweep(home, share * both, what, each)
        for pid, _ in processes(home):
            os.kill(pid, signal.SIGKILL)
        print(
            f"{number}: {what} killed after {share:.0%}: {'; '.join(differences) or 'as undisturbed'}",
            flush=True,
        )
        return differences

    with ThreadPoolExecutor(2) as pool:
        wrong = sum(map(bool, pool.map(kill, range(kills))))
    print(f"{wrong} of {kills} kills end otherwise than an undisturbed run")
    return 1 if wrong else 0


if __name__ == "__main__":
    kills, seed = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, 50), (3, 0)))
    sys.exit(main(Path(sys.argv[1]).resolve(), kills, seed))
