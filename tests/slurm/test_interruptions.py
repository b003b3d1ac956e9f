"""Runs that a real SLURM takes off their nodes end with the bits of one that nobody disturbed."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from app import Ended, run
from cluster import Cluster, base
from sweeps import TINY, Place, events, states, steps, until, weights

from weightgeom.training.resuming import SEAL, STATE_PREFIX

STEPS = 240  # many more than a job makes between two looks at it; it is frozen while SLURM takes its time
TRAINING = [f"training.steps={STEPS}", "seed=3"]
LIMITED = "hydra.launcher.timeout_min=30"
HELD = "hydra.launcher.additional_parameters={hold: true}"
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@dataclass(frozen=True)
class Story:
    """The outcome of a sweep of one run, and the progress of its record at each disturbance."""

    place: Place
    sweep: Path
    waited: Ended
    disturbed_at: list[int]


Disturbance = Callable[[Cluster, Path], None]


def disturbed(
    cluster: Cluster, home: Path, name: str, node: str, options: list[str], *disturbances: Disturbance
) -> Story:
    """Run a sweep of one run, disturbed once it has made some steps since the last time."""
    place = cluster.at(home)
    own = ["hydra/launcher=slurm", f"hydra.launcher.nodelist={node}", f"name={name}"]
    sweep = place.started(*own, *TRAINING, *options)
    if HELD in options:  # of a time limit that a test shortens itself
        cluster.ask("scontrol", "update", f"jobid={base(sweep)}", "timelimit=30")
        cluster.ask("scontrol", "release", base(sweep))
    at = []
    with place.popen("wait", sweep, "--poll", "0.3") as waiting:
        for number, disturb in enumerate(disturbances):
            until(lambda n=number: attempts(sweep) > n)
            before = last(sweep)
            until(lambda b=before: last(sweep) > b + 15)
            at.append(last(sweep))
            disturb(cluster, sweep)
        out, err = waiting.communicate(timeout=1800)
    return Story(place, sweep, Ended(waiting.returncode, out, err), at)


def attempts(sweep: Path) -> int:
    return states(sweep).count("RUNNING")


def last(sweep: Path) -> int:
    return max(steps(sweep), default=0)


@contextmanager
def frozen_until_signalled(sweep: Path) -> Iterator[None]:
    """The run makes no step from here on until SLURM has signalled it, whatever the machine's speed."""
    pid = events(sweep)[-1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
        until(lambda: signalled(pid))
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def signalled(pid: int) -> bool:
    """Whether USR2 or TERM waits for a stopped process, or SLURM has let it go on with it, as 22.05 does."""
    with suppress(FileNotFoundError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        waiting = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
        announced = 1 << signal.SIGUSR2 - 1 | 1 << signal.SIGTERM - 1
        return not fields["State"].startswith("T") or bool(waiting & announced)
    return True


@contextmanager
def frozen_but_to_save(sweep: Path) -> Iterator[None]:
    """The run makes no step from here on until SLURM kills it, but those in which it saves its state."""
    pid, before = events(sweep)[-1]["pid"], newest_state(sweep)
    with frozen_until_signalled(sweep):
        yield
    until(lambda: newest_state(sweep) > before or gone(pid))
    until(lambda: frozen_again(pid))


def newest_state(sweep: Path) -> int:
    """The step of the newest complete state of the only training."""
    seals = (sweep.parents[2] / "training").glob(f"*/{STATE_PREFIX}*/{SEAL}")
    return max((int(seal.parent.name.removeprefix(STATE_PREFIX)) for seal in seals), default=0)


def frozen_again(pid: int) -> bool:
    """Stop a process that SLURM lets go on whenever it signals it; whether it is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    return gone(pid)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def run_out_of_time(cluster: Cluster, sweep: Path) -> None:
    """Shorten the time limit of the running job to about a minute from now, and restore it afterwards."""
    job, elapsed = f"jobid={base(sweep)}", time.time() - events(sweep)[-1]["began"]
    with frozen_until_signalled(sweep):
        # SLURM looks every 30 s, and signals up to 30 s early.
        cluster.ask("scontrol", "update", job, f"timelimit={int(elapsed + 45) // 60 + 1}")
    until(lambda: states(sweep)[-1] != "RUNNING")
    cluster.ask("scontrol", "update", job, "timelimit=30")


def urgent_job(cluster: Cluster, sweep: Path) -> None:
    node = events(sweep)[-1]["node"]
    wanted = ["-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    cluster.ask("sbatch", *wanted, cwd=sweep)


def preempt(cluster: Cluster, sweep: Path) -> None:
    with frozen_until_signalled(sweep):
        urgent_job(cluster, sweep)


def preempt_without_user_signal(cluster: Cluster, sweep: Path) -> None:
    configuration = cluster.directory / "etc/slurm.conf"
    before = configuration.read_text()
    configuration.write_text(before.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
    with frozen_but_to_save(sweep):
        cluster.ask("scontrol", "reconfigure")
        urgent_job(cluster, sweep)
    until(lambda: attempts(sweep) == 3)
    configuration.write_text(before)
    cluster.ask("scontrol", "reconfigure")


def requeue(cluster: Cluster, sweep: Path) -> None:
    with frozen_but_to_save(sweep):
        cluster.ask("scontrol", "requeue", base(sweep))


def lose_node(cluster: Cluster, sweep: Path) -> None:
    node = events(sweep)[-1]["node"]
    os.kill(events(sweep)[-1]["pid"], signal.SIGSTOP)
    cluster.script("kill-node", node)
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(2)
    cluster.script("start-node", node)


@pytest.fixture(scope="module")
def stories(
    cluster: Cluster, outputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Story]"]]:
    """All of them at the same time, each on a node and in outputs of its own."""

    def home(name: str) -> Path:
        place = tmp_path_factory.mktemp(name)
        shutil.copytree(outputs, place / "outputs")
        return place

    # Of 2 minutes with a minute's notice, so that any signal announces their end.
    short = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60", HELD]
    workers, saves = "training.workers=1", "training.save_every=25"
    plans = {
        "timeout": ("n1", [*short, "hydra.launcher.max_num_timeout=2"], (run_out_of_time, run_out_of_time)),
        "once": ("n1", [*short, "hydra.launcher.max_num_timeout=0"], (run_out_of_time,)),
        "preemption": ("n2", [LIMITED, workers], (preempt, preempt_without_user_signal)),
        "node": ("n3", [LIMITED, saves], (requeue, lose_node)),
    }
    with ThreadPoolExecutor() as pool:
        story_of = {
            name: pool.submit(disturbed, cluster, home(name), name, node, options, *disturbances)
            for name, (node, options, disturbances) in plans.items()
        }
        yield story_of
        for story in story_of.values():
            story.exception()


@pytest.fixture(scope="module")
def undisturbed(stories, outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that the same run ends with in a process that nobody disturbs."""
    home = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(outputs, home / "outputs")
    ended = run(home, *TINY, *TRAINING)
    assert ended.code == 0, ended.err
    return weights(home, STEPS)


def assert_whole(story: Story, name: str, undisturbed: dict[str, torch.Tensor]) -> None:
    """It is complete, in one record and one MLflow run, step by step, and with the same bits."""
    assert story.waited.code == 0, story.waited.out + story.waited.err
    assert "FAILED" not in story.waited.out and "CANCELLED" not in story.waited.out
    assert steps(story.sweep) == list(range(1, STEPS + 1))
    assert story.place.statuses(name) == ("FINISHED", {"3": "FINISHED"})
    resumed_weights = weights(story.place.home, STEPS)
    assert resumed_weights.keys() == undisturbed.keys()
    assert all(torch.equal(resumed_weights[key], weight) for key, weight in undisturbed.items())


def resumed(sweep: Path) -> list[int]:
    """From which steps its attempts went on."""
    log = (sweep / f"slurm/{base(sweep)}_0_log.out").read_text()
    return [int(step) for step in re.findall(r"resuming from step (\d+)", log)]


def test_at_a_time_limit_no_step_is_lost(cluster, stories, undisturbed):
    story = stories["timeout"].result()
    assert_whole(story, "timeout", undisturbed)
    paused = [event for event in events(story.sweep) if event["state"] == "INTERRUPTED"]
    assert [event["timeouts"] for event in paused] == [1, 2]
    stops = [int(event["error"].split()[3].strip(",;")) for event in paused]
    assert resumed(story.sweep) == stops
    assert cluster.restarts(story.sweep) == 2


def test_a_job_that_may_not_run_out_of_time_fails_and_says_so(stories):
    story = stories["once"].result()
    assert story.waited.code == 1
    assert "(FAILED on n1): TimeoutError: the time limit of 2 min was reached" in story.waited.out
    assert story.place.statuses("once") == ("FAILED", {"3": "FAILED"})


def test_a_preempted_job_with_workers_is_requeued_once_with_and_without_the_users_signal(
    cluster, stories, undisturbed
):
    story = stories["preemption"].result()
    assert_whole(story, "preemption", undisturbed)
    assert states(story.sweep) == ["RUNNING", "INTERRUPTED", "RUNNING", "RUNNING", "COMPLETED"]
    assert cluster.restarts(story.sweep) == 2
    stopped, saved = resumed(story.sweep)
    assert stopped >= story.disturbed_at[0] and saved >= story.disturbed_at[1]
    assert events(story.sweep)[-1]["timeouts"] == 0


def test_a_job_that_is_requeued_or_loses_its_node_loses_one_save_interval_at_most(
    cluster, stories, undisturbed
):
    story = stories["node"].result()
    assert_whole(story, "node", undisturbed)
    assert cluster.restarts(story.sweep) == 2
    went_on = resumed(story.sweep)
    if len(went_on) == 1:  # the first time there was no state yet
        went_on = [0, *went_on]
    for step, reached in zip(went_on, story.disturbed_at, strict=True):
        assert step >= reached - 25
