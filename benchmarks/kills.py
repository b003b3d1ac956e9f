"""Kills runs and sweeps at random moments, goes on with them, and compares the end with undisturbed ones.

    python benchmarks/kills.py DIRECTORY [KILLS] [SEED]

A third of the kills hit a run in outputs of its own; a third the launcher, the supervisor or a job of a local
sweep of two; a third its `resubmit`. Half of them begin from nothing, so that the making of the store and of
the base is hit too, and half from a store and a base that are there. Afterwards the same command (a run) or
`resubmit` (a sweep) goes on until all is done. Prints a line for each, and exits with 1 if tables differ,
points are in a record twice, a job completes twice, or MLflow still has a run RUNNING or SCHEDULED after
`sync`.

The tables to compare with are those of a sweep in processes of its own. All later runs, launchers,
supervisors and jobs are forks of this process, which has imported the libraries that the jobs of that sweep
have: a kill hits our code and not an import, and costs a fraction. A moment is a share of the processor time
that the same thing takes undisturbed, so that it does not depend on what else the machine does.
"""

import json
import os
import random
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from commands import ROOT, environment, newest, tables

from runners.launcher import local
from runners.launcher.warm import MODULES, Fork, Libraries
from runners.tracking.stores import open_store

SMALL = (
    "model.d_model=32 model.d_mlp=64 model.layers=1 model.heads=2 model.vocabulary=512"
    " model.pretraining.steps=4 model.pretraining.batch_size=4 model.pretraining.max_length=32"
    " training.steps=4 training.batch_size=4 training.max_length=48 training.log_every=1"
    " training.save_every=1 probe.rsf.tokens=256 probe.rsf.prompts=8 probe.rsf.resamples=2"
    " probe.behaviour.tokens=256 device=cpu +data.documents=60 +data.pairs=24 +data.heldout=8 name=kills"
).split()
SWEEP = ["objective=dpo,ce", "-m"]
RUN, LAUNCHER, SYNC = str(ROOT / "run.py"), "runners.launcher", "runners.tracking"
VICTIMS = (RUN, "runners.launcher.local_main", "runners.launcher.jobs")
FORKS = "forks.txt"  # in a home: pid and command of every process
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds


def started(home: Path, command: str, arguments: Sequence[str], log: str = "", more: Any = None) -> Fork:
    """A script or module as a fork in a session of its own that works in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    return Fork(partial(ran, home, command, arguments), Path(log or home / "log.txt"), more or {})


def ran(home: Path, command: str, arguments: Sequence[str]) -> int:
    """Run a script or module in this process, as `python` does; its exit code."""
    with (home / FORKS).open("a") as file:
        file.write(f"{os.getpid()} {command}\n")
    os.chdir(home)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [command, *arguments]
    # The supervisor, and in it the jobs.
    local.subprocess = SimpleNamespace(Popen=partial(popen, home), DEVNULL=subprocess.DEVNULL)  # pyright: ignore
    try:
        if command == RUN:
            runpy.run_path(command, run_name="__main__")
        else:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def popen(home: Path, command: list[str], *, stdout: Any, env: Any = None, **_: object) -> Fork:
    """In place of `subprocess.Popen` for `... python -m MODULE ARGUMENTS`."""
    module, *arguments = command[max(command.index(flag) for flag in ("-m", "-um") if flag in command) + 1 :]
    return started(home, module, arguments, stdout.name, env)


@dataclass
class Clock:
    """The processor seconds of all processes that have worked in `home`, or of the process `only`."""

    home: Path
    only: int | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def __call__(self) -> float:
        for pid in (pid for pid, _ in forks(self.home) if self.only in (None, int(pid))):
            with suppress(OSError):
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.seconds[pid] = TICK * (int(times[11]) + int(times[12]))
        return sum(self.seconds.values())


def forks(home: Path) -> list[tuple[str, str]]:
    """Pid and command of every process that has been started in `home`."""
    path = home / FORKS
    lines = path.read_text().splitlines() if path.exists() else []
    return [(pid, command) for pid, _, command in (line.partition(" ") for line in lines)]


def alive(home: Path, victim: str = "") -> list[int]:
    """The processes in `home` that have not ended, with this command."""

    def state(pid: str) -> str:
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "gone"

    chosen = [pid for pid, command in forks(home) if victim in ("", command)]
    return [int(pid) for pid in chosen if state(pid) not in ("Z", "X", "gone")]


def ended(home: Path, command: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output."""
    log = home / f"log.{time.time_ns()}.txt"
    process = started(home, command, arguments, str(log))
    while process.poll() is None:
        time.sleep(0.02)
    return process.code or 0, log.read_text(errors="replace")


def sweeps(home: Path) -> list[Path]:
    """Directories of sweeps that have jobs."""
    paths = sorted(home.glob("outputs/jobs/*/*/sweep.json"))
    return [path.parent for path in paths if json.loads(path.read_text())["jobs"]]


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
    with closing(sqlite3.connect(f"file:{home}/outputs/mlflow.db?mode=ro", uri=True)) as store:
        counts = dict(store.execute("select status, count(*) from runs group by status").fetchall())
        ids = [id for (id,) in store.execute("select run_uuid from runs where status = 'FINISHED'")]
        query = "select key, step, count(*) from metrics where run_uuid = ? group by key, step"
        for id in ids:
            if twice := [key for key, _, number in store.execute(query, [id]) if number > 1]:
                yield f"MLflow has points of {twice[0]} twice"
    if set(counts) & {"RUNNING", "SCHEDULED"} or counts.get("FINISHED", 0) < len(records):
        yield f"MLflow has {counts}"
    if broken := list((home / "outputs").glob("mlflow.db.broken-*")):
        yield f"a store was broken: {broken[0].name}"


def verdict(home: Path, records: list[Path], expected: list[dict[str, str]]) -> list[str]:
    """The faults of runs that have ended, and those whose tables differ from the expected ones."""
    code, out = ended(home, SYNC, "sync")
    if code:
        return [f"sync ended with {code}: {out[-500:]}"]
    differ = [f"tables of {n} differ" for n, one in enumerate(records) if tables(one) != expected[n]]
    return [*faults(home, records), *differ]


def killed(clock: Clock, moment: float, victim: str, process: Fork) -> bool:
    """SIGKILL a process with the command `victim` once the clock shows `moment`.

    False if there was none any more.
    """
    home = clock.home
    while not (reached := clock() >= moment) or not (there := alive(home, victim)):
        if process.poll() is not None and (reached or not alive(home)):
            return False
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.kill(random.choice(there), signal.SIGKILL)
    return True


@dataclass(frozen=True)
class Undisturbed:
    """Tables of the two jobs, homes to begin from, and processor seconds, from nothing and from those."""

    expected: list[dict[str, str]]
    begun: Path
    run: tuple[float, float]
    sweep: tuple[float, float]
    resubmit: float

    def home(self, home: Path, begun: bool) -> Path:
        """Make a home that is empty, or has a store and a base."""
        shutil.copytree(self.begun, home) if begun else home.mkdir()
        return home


def of_run(home: Path, moment: float, expected: list[dict[str, str]]) -> tuple[bool, list[str]]:
    """Kill a run after `moment` processor seconds, and run it again."""
    process = started(home, RUN, SMALL)
    hit = killed(Clock(home), moment, RUN, process)
    while process.poll() is None:
        time.sleep(0.02)
    code, out = ended(home, RUN, *SMALL)
    return hit, [out[-500:]] if code else verdict(home, [newest(home)], expected)


def of_sweep(
    home: Path, moment: float, victim: str, later: float, expected: list[dict[str, str]]
) -> tuple[bool, list[str]]:
    """Kill the `victim` among the processes of a sweep, or of its `resubmit`, and submit it again."""
    process = started(home, RUN, [*SMALL, *SWEEP])
    hit = killed(Clock(home), moment, VICTIMS[-1] if victim == "resubmit" else victim, process)
    while process.poll() is None:
        time.sleep(0.02)
    if not sweeps(home):  # nothing was submitted yet
        code, out = ended(home, RUN, *SMALL, *SWEEP)
        if code:
            return hit, [out[-500:]]
    (sweep,) = sweeps(home)
    if victim == "resubmit":
        ended(home, LAUNCHER, "wait", "--poll", "0.1", str(sweep))
        again = started(home, LAUNCHER, ["resubmit", str(sweep)])
        hit = killed(Clock(home, again.pid), later, LAUNCHER, again)
        while again.poll() is None:
            time.sleep(0.02)
    out = ""
    for _ in range(5):
        code, out = ended(home, LAUNCHER, "wait", "--poll", "0.1", str(sweep))
        if not code:
            break
        ended(home, LAUNCHER, "resubmit", str(sweep))
    else:
        return hit, [f"five times resubmitted: {out[-500:]}"]
    return hit, verdict(home, [sweep / number / "record" for number in "01"], expected)


def spent(home: Path, command: str, *arguments: str, alone: bool = False) -> float:
    """The processor seconds of a command in `home`, with all that it starts or `alone`."""
    process = started(home, command, arguments)
    clock = Clock(home, process.pid if alone else None)
    while process.poll() is None or alive(home):
        clock()
        time.sleep(0.01)
    assert process.code == 0, (home / "log.txt").read_text()[-2000:]
    return clock()


def unrendered(figure: object, path: Path | None = None, **_: object) -> None:
    """In place of matplotlib's rendering, which is most of the time of so small a run."""
    if path is not None:
        path.write_text("figure")


def undisturbed(directory: Path) -> Undisturbed:
    """Run a sweep undisturbed for its tables and times, and import the libraries of its jobs."""
    home = directory / "processes"
    home.mkdir(parents=True)
    command = [sys.executable, RUN, *SMALL, *SWEEP]
    subprocess.run(command, cwd=home, env=environment(), check=True, stdin=subprocess.DEVNULL)
    (sweep,) = sweeps(home)
    expected = [tables(sweep / number / "record") for number in "01"]
    assert all(expected), expected
    libraries = Libraries(sweep / MODULES, [environment()])
    assert libraries.warm()
    from matplotlib.figure import Figure

    from runners.pipeline.fingerprint import package

    package()  # parses all code, once for all forks
    Figure.draw_without_rendering = Figure.savefig = unrendered  # pyright: ignore
    begun = directory / "begun"
    (begun / "outputs").mkdir(parents=True)
    if (pid := os.fork()) == 0:
        open_store(f"sqlite:///{begun}/outputs/mlflow.db", "earlier")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    shutil.copytree(home / "outputs/pretraining", begun / "outputs/pretraining")
    times: list[tuple[float, float]] = []
    for name, more in (("run", []), ("sweep", SWEEP)):
        for one in (directory / name, directory / f"{name}-begun"):
            if one.name.endswith("begun"):
                shutil.copytree(begun, one)
            seconds = spent(one, RUN, *SMALL, *more)
            times[len(times) :] = [(seconds, seconds)]
    one = directory / "sweep-begun"
    (sweep,) = sweeps(one)
    state = sweep / "0/state.json"
    state.write_text(state.read_text().replace("COMPLETED", "KILLED"))
    resubmit = spent(one, LAUNCHER, "resubmit", str(sweep), alone=True)
    return Undisturbed(expected, begun, (times[0][0], times[1][0]), (times[2][0], times[3][0]), resubmit)


def main(directory: Path, kills: int, seed: int) -> int:
    """Print what every kill leads to; the exit code."""
    os.environ.update(environment())
    given = undisturbed(directory)
    print(f"processor seconds undisturbed: {given.run=} {given.sweep=} {given.resubmit=}", flush=True)
    rng, wrong, hits = random.Random(seed), 0, 0
    random.seed(seed)
    for number in range(kills):
        share, later, begun = rng.random(), rng.random(), bool(number // 3 % 2)
        shown = later if number % 3 == 1 else share
        home = given.home(directory / str(number), begun)
        if number % 3 == 0:
            what = "run"
            hit, found = of_run(home, share * given.run[begun], given.expected)
        else:
            what = "resubmit" if number % 3 == 1 else VICTIMS[number // 3 % 3]
            moment = share * given.sweep[begun] * (0.7 if what == "resubmit" else 1)  # some job still runs
            hit, found = of_sweep(home, moment, what, later * given.resubmit, given.expected)
        for pid in alive(home):
            os.kill(pid, signal.SIGKILL)
        place = "from a base and a store" if begun else "from nothing"
        how = f"killed after {shown:.0%}" if hit else f"had ended before {shown:.0%}"
        print(f"{number}: {what} {place} {how}: {'; '.join(found) or 'as undisturbed'}", flush=True)
        wrong, hits = wrong + bool(found), hits + hit
    print(f"{hits} of {kills} hit a process")
    print(f"{wrong} of {kills} kills end otherwise than an undisturbed run")
    return 1 if wrong else 0


if __name__ == "__main__":
    kills, seed = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, 50), (3, 0)))
    sys.exit(main(Path(sys.argv[1]).resolve(), kills, seed))
