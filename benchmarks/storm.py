"""Disturbs sweeps of six at random, goes on with them, and compares the end with an undisturbed one.

    python benchmarks/storm.py DIRECTORY [DISTURBANCES] [SEED] [--local]

Under the SLURM that `sinfo` shows: USR2, TERM and KILL to a job, `scontrol requeue`, a node that is lost, one
that is cut off while its jobs live on (these two where tests/helpers/slurm-local has made the cluster),
`resubmit`, two of them at once, and a submitter that is killed. With `--local` those that exist here, and a
supervisor that is killed. A sweep that ends before all disturbances were made is followed by another.

Prints a line for each, and exits with 1 if a finished job runs again, points are in a record twice or not at
all, tables differ, MLflow and the records differ, or the accounting has another end.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import LAUNCHER, ROOT, RUN, ended, processes, started, tables
from kills import SMALL

JOBS, STEPS = 6, 60
SWEEP = [f"training.steps={STEPS}", "training.save_every=5", "objective=dpo,ce", "seed=0,1,2", "-m"]
UNDER_SLURM = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=1", "hydra.launcher.poll_s=1"]
HERE = ["hydra.launcher.array_parallelism=3"]
ENDS = {"COMPLETED", "REQUEUED", "NODE_FAIL", "FAILED", "CANCELLED", "PREEMPTED"}


@dataclass(frozen=True)
class Storm:
    """A sweep in `home` and the chance that disturbs it."""

    home: Path
    rng: random.Random
    local: bool

    def sweep(self) -> Path | None:
        sweeps = sorted(self.home.glob("outputs/jobs/*/*/sweep.json"))
        return sweeps[-1].parent if sweeps and manifest(sweeps[-1].parent)["jobs"] else None

    def launcher(self) -> list[str]:
        own = HERE if self.local else UNDER_SLURM
        return [*RUN, *SMALL, *own, *SWEEP, "hydra.launcher.detach=true"]

    def command(self, name: str) -> tuple[int, str]:
        return ended(self.home, [*LAUNCHER, name, str(self.sweep())])

    def running(self) -> list[dict[str, Any]]:
        """The states of the jobs that run."""
        states = [state(self.home, number) for number in range(JOBS)]
        return [known for known in states if known.get("state") == "RUNNING"]

    def disturb(self) -> str:
        """One disturbance at random; returns it in words."""
        everywhere: list[Callable[[], str]] = [self.usr2, self.term, self.kill, self.resubmit, self.submitter]
        elsewhere = [self.supervisor] if self.local else [self.requeue, self.twice]
        if not self.local and "LOCAL_SLURM_DIR" in os.environ:
            elsewhere += [self.lose, self.cut_off]
        return self.rng.choice([*everywhere, *elsewhere])()

    def signalled(self, name: str) -> str:
        if not (running := self.running()):
            return f"no job runs to get {name}"
        job = self.rng.choice(running)
        if self.local or name == "KILL":
            with suppress(ProcessLookupError):
                os.kill(job["pid"], signal.Signals[f"SIG{name}"])
        else:
            subprocess.run(["scancel", "-s", name, job["id"]], capture_output=True)
        return f"{name} to {job['id']}"

    def usr2(self) -> str:
        return self.signalled("USR2")

    def term(self) -> str:
        return self.signalled("TERM")

    def kill(self) -> str:
        return self.signalled("KILL")

    def requeue(self) -> str:
        if not (running := self.running()):
            return "no job runs to be requeued"
        job = self.rng.choice(running)
        subprocess.run(["scontrol", "requeue", job["id"]], capture_output=True)
        return f"{job['id']} requeued"

    def lose(self) -> str:
        if not (running := self.running()):
            return "no job runs on a node to lose"
        node = self.rng.choice(running)["node"]
        script = str(ROOT / "tests/helpers/slurm-local")
        subprocess.run([script, "kill-node", node], capture_output=True)
        self.returns(node)
        return f"node {node} lost"

    def cut_off(self) -> str:
        if not (running := self.running()):
            return "no job runs on a node to cut off"
        node = self.rng.choice(running)["node"]
        pid = int(Path(os.environ["LOCAL_SLURM_DIR"], f"run/slurmd-{node}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        self.returns(node)
        return f"node {node} cut off"

    def returns(self, node: str) -> None:
        """SLURM learns that the node is gone, and the node comes back later."""
        mark = ["scontrol", "update", f"nodename={node}", "state=down", "reason=storm"]
        subprocess.run(mark, capture_output=True)
        time.sleep(self.rng.uniform(0, 8))
        subprocess.run([str(ROOT / "tests/helpers/slurm-local"), "start-node", node], capture_output=True)
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)

    def resubmit(self) -> str:
        code, out = self.command("resubmit")
        return f"resubmit ({' '.join(out.split()[:4])}...{f', {code}' if code else ''})"

    def twice(self) -> str:
        command = [*LAUNCHER, "resubmit", str(self.sweep())]
        both = [started(self.home, command) for _ in range(2)]
        for process in both:
            process.communicate()
        return "two resubmits at once"

    def submitter(self) -> str:
        """Kill a job, and the `resubmit` that would start it again."""
        what = self.kill()
        time.sleep(self.rng.uniform(2, 6))
        process = started(self.home, [*LAUNCHER, "resubmit", str(self.sweep())])
        moment = self.rng.uniform(0.5, 6)
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"{what}, and its resubmit killed after {moment:.1f} s"

    def supervisor(self) -> str:
        plans = [json.loads(path.read_text()) for path in self.home.rglob("supervisor.*.json")]
        alive = {pid for pid, _ in processes(self.home)}
        supervisors = [plan["pid"] for plan in plans if plan.get("pid") in alive]
        for pid in supervisors[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return f"supervisor {supervisors[0]} killed" if supervisors else "no supervisor to kill"


def manifest(sweep: Path) -> dict[str, Any]:
    """The content of sweep.json."""
    return json.loads((sweep / "sweep.json").read_text())


def state(home: Path, number: int) -> dict[str, Any]:
    """The state of a job of the only sweep in `home`."""
    (path, *_) = [*home.glob(f"outputs/jobs/*/*/{number}/state.json"), None]
    return {} if path is None else json.loads(path.read_text())


def survived(storm: Storm, limit: int) -> int:
    """Start a sweep, disturb it until it or the `limit` ends, and let it end; returns the disturbances."""
    made, began = 0, time.monotonic()
    process = started(storm.home, storm.launcher())
    if storm.rng.random() < 0.4:  # the first submitter is killed
        moment = storm.rng.uniform(2, 15)
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        made += 1
        print(f"  {moment:.0f} s: submitter killed", flush=True)
    process.communicate()
    for _ in range(3):
        if storm.sweep() is None:  # it had not come to its jobs
            assert not ended(storm.home, storm.launcher())[0]
    while made < limit and len(finished(storm.home)) < JOBS:
        time.sleep(storm.rng.uniform(1, 12))
        what = storm.disturb()
        made += not what.startswith("no ")
        print(f"  {time.monotonic() - began:.0f} s: {what}", flush=True)
    for _ in range(10):
        if not storm.command("wait")[0]:
            break
        storm.command("resubmit")
    print(f"  {time.monotonic() - began:.0f} s: ended", flush=True)
    return made


def finished(home: Path) -> list[int]:
    """The numbers of the jobs that have completed."""
    return [number for number in range(JOBS) if state(home, number).get("state") == "COMPLETED"]


def faults(storm: Storm, expected: list[dict[str, str]]) -> Iterator[str]:
    """The differences from an undisturbed end."""
    sweep = storm.sweep()
    assert sweep is not None
    code, out = storm.command("status")
    if code:
        yield f"status ends with {code}: {out[-600:]}"
    ended(storm.home, [sys.executable, "-m", "runners.tracking"])
    store = sqlite3.connect(f"file:{storm.home}/outputs/mlflow.db?mode=ro", uri=True)
    for number in range(JOBS):
        record = sweep / str(number) / "record"
        states = [json.loads(line)["state"] for line in lines(sweep / str(number) / "events.jsonl")]
        if states.count("COMPLETED") != 1 or states[-1] != "COMPLETED":
            yield f"#{number} has the states {states}"
        points = Counter(
            (p["key"], p["step"], p["value"]) for p in map(json.loads, lines(record / "metrics.jsonl"))
        )
        keys = Counter((key, step) for key, step, _ in points.elements())
        if twice := sum(keys.values()) - len(keys):
            yield f"#{number} has {twice} points twice"
        if missing := set(range(1, STEPS + 1)) - {step for key, step in keys if key == "train/loss"}:
            yield f"#{number} lacks the steps {sorted(missing)}"
        if tables(record) != expected[number]:
            yield f"the tables of #{number} differ"
        (run,) = store.execute(
            "select run_uuid, status from runs join tags using (run_uuid)"
            " where tags.key = 'record_id' and tags.value = ? and lifecycle_stage = 'active'",
            [json.loads((record / "run.json").read_text())["id"]],
        ).fetchall()
        shown = store.execute("select key, step, value from metrics where run_uuid = ?", run[:1]).fetchall()
        if run[1] != "FINISHED" or Counter(shown) != points:
            yield f"MLflow has #{number} as {run[1]} with {len(shown)} points of {sum(points.values())}"
    statuses = dict(store.execute("select status, count(*) from runs group by status").fetchall())
    if statuses != {"FINISHED": JOBS + 1}:
        yield f"MLflow has {statuses}"
    if not storm.local:
        yield from unaccounted(sweep)


def unaccounted(sweep: Path) -> Iterator[str]:
    """The jobs whose rows in the accounting are not those of their attempts."""
    ids: dict[int, list[str]] = {number: [] for number in range(JOBS)}
    for submission in manifest(sweep)["submissions"]:
        for number, id in submission["ids"].items():
            ids[int(number)].append(id)
    time.sleep(3)  # the accounting lags
    for number, own in ids.items():
        asked = ["sacct", "-n", "-P", "-D", "-X", "-o", "State,ExitCode", "-j", ",".join(own)]
        rows = [row.split("|") for row in subprocess.check_output(asked, text=True).splitlines()]
        counts = Counter(name.split(" ")[0] for name, _ in rows)
        logs = "".join(
            (sweep / f"slurm/{id}_0_log.out").read_text()
            for id in own
            if (sweep / f"slurm/{id}_0_log.out").exists()
        )
        idle = logs.count("nothing to do: ") + logs.count(f"job {number} does not start")
        starts = sum(
            json.loads(line)["state"] == "RUNNING" for line in lines(sweep / f"{number}/events.jsonl")
        )
        if counts["COMPLETED"] != 1 + idle or set(counts) - ENDS or sum(counts.values()) < starts:
            yield f"the accounting of #{number} has {dict(counts)} for {starts} starts and {idle} idle ones"


def lines(path: Path) -> list[str]:
    """The lines of a file."""
    return path.read_text().splitlines()


def main(directory: Path, disturbances: int, seed: int, local: bool) -> int:
    """Print the disturbances and the faults; the exit code."""
    rng = random.Random(seed)
    calm = Storm(directory / "calm", rng, local)
    code, out = ended(calm.home, calm.launcher())
    assert code == 0, out
    assert calm.command("wait")[0] == 0
    sweep = calm.sweep()
    assert sweep is not None
    expected = [tables(sweep / str(number) / "record") for number in range(JOBS)]
    wrong, made, rounds = list(faults(calm, expected)), 0, 0
    print(f"undisturbed: {'; '.join(wrong) or 'as it should be'}", flush=True)
    while made < disturbances:
        storm = Storm(directory / str(rounds), rng, local)
        made += survived(storm, disturbances - made)
        more = list(faults(storm, expected))
        print(
            f"sweep {rounds}, {made} disturbances so far: {'; '.join(more) or 'as undisturbed'}", flush=True
        )
        wrong, rounds = wrong + more, rounds + 1
        for pid, _ in processes(storm.home):
            os.kill(pid, signal.SIGKILL)
    print(f"{made} disturbances of {rounds} sweeps of {JOBS}: {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--local"]
    disturbances, seed = (int(given[n]) if len(given) > n else default for n, default in ((1, 30), (2, 0)))
    sys.exit(main(Path(given[0]).resolve(), disturbances, seed, "--local" in sys.argv))
