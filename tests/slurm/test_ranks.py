"""Trainings whose processes are the tasks of a job under a real SLURM, against those of one machine.

A training of copies has two tasks on one node, of which one is killed; one of parts has one on each of two
nodes. SLURM takes both off their nodes as well.
"""

import re
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from app import BEHAVIOUR, WORLD, run
from cluster import Cluster, base
from pandas import read_parquet
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file
from sweeps import Place, directory, events, rows, states, steps, until

STEPS, SAVED = 40, 5
# Steps of some 0.2 s, so that a training outlasts the 5 s that SLURM leaves to a job that it requeues.
SLOWLY = [f"training.steps={STEPS}", f"training.save_every={SAVED}", "training.accumulate=20"]
ASKED = [*BEHAVIOUR, *WORLD, "objective=dpo", *SLOWLY, "seed=3"]
UNDER_SLURM = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=30", "hydra.launcher.detach=true", "-m"]
KINDS = {
    "copies": ([], ["hydra.launcher.tasks_per_node=2"]),
    "parts": (["training.shard=true"], ["hydra.launcher.nodes=2"]),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@dataclass
class Story:
    """The outcome of a sweep of one run."""

    cluster: Cluster
    place: Place
    sweep: Path
    output: str = ""  # by commands on it
    shown: dict[int, str] | None = None  # by `status` after a process was killed
    left: list[psutil.Process] | None = None  # that outlived the kill

    def advanced(self, attempt: int) -> None:
        """Wait until an attempt has made some steps more than the one before, and saved a state."""
        before = max(steps(self.sweep), default=0)
        until(lambda: states(self.sweep).count("RUNNING") == attempt)
        until(lambda: max(steps(self.sweep), default=0) > before + SAVED)

    def tasks(self) -> dict[int, psutil.Process]:
        """The processes of the running job's tasks by rank."""
        by_rank = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                own = variables.get("SLURM_JOB_ID") == base(self.sweep)
                if own and "runners.launcher.task" in process.cmdline():
                    by_rank[int(variables["SLURM_PROCID"])] = process
        return by_rank

    def command(self, *arguments: str) -> int:
        name, *more = arguments
        ended = self.place.command(name, self.sweep, *more)
        self.output += ended.out + ended.err
        return ended.code

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.sweep / "slurm").glob("*_0_log.out")))


def started(cluster: Cluster, home: Path, kind: str) -> Story:
    place = cluster.at(home)
    own, tasks = KINDS[kind]
    ended = run(home, *ASKED, f"name={kind}", *own, *tasks, *UNDER_SLURM, **place.variables)
    assert ended.code == 0, ended.err + ended.out
    return Story(cluster, place, directory(ended))


def killed_and_requeued(cluster: Cluster, home: Path) -> Story:
    story = started(cluster, home, "copies")
    story.advanced(1)
    tasks = story.tasks()
    processes = [process for task in tasks.values() for process in (task, *task.children(recursive=True))]
    tasks[1].send_signal(signal.SIGKILL)
    assert story.command("wait", "--poll", "0.3") == 1
    story.shown = rows(story.place.command("status", story.sweep))
    story.left = [process for process in processes if process.is_running()]
    assert story.command("resubmit") == 0
    story.advanced(2)
    cluster.ask("scontrol", "requeue", base(story.sweep))
    story.command("wait", "--poll", "0.3")
    return story


def signalled(cluster: Cluster, home: Path) -> Story:
    story = started(cluster, home, "parts")
    story.advanced(1)
    cluster.ask("scancel", "--signal=USR2", base(story.sweep))
    story.command("wait", "--poll", "0.3")
    return story


STORIES: dict[str, Callable[[Cluster, Path], Story]] = {"copies": killed_and_requeued, "parts": signalled}


@pytest.fixture(scope="module")
def homes(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def home(name: str) -> Path:
        place = tmp_path_factory.mktemp(name)
        shutil.copytree(outputs, place / "outputs")
        return place

    return home


@pytest.fixture(scope="module")
def stories(cluster: Cluster, homes) -> Iterator[dict[str, "Future[Story]"]]:
    """All at the same time, in outputs of their own."""
    with ThreadPoolExecutor() as pool:
        yield {kind: pool.submit(story, cluster, homes(kind)) for kind, story in STORIES.items()}


@pytest.fixture(scope="module")
def here(stories, homes) -> dict[str, Path]:
    """Homes of the same runs on two processes of this machine, which nobody disturbs."""
    places = {}
    for kind, (own, _) in KINDS.items():
        stories[kind].exception()  # waits: two at a time are enough
        places[kind] = homes(f"{kind}-here")
        ended = run(places[kind], *ASKED, *own, "training.processes=2")
        assert ended.code == 0, ended.err
    return places


def files(home: Path, pattern: str) -> dict[Path, Path]:
    """Files of the stages, by their place in a home."""
    by_place = {path.relative_to(home): path for path in (home / "outputs").glob(pattern)}
    return {place: path for place, path in by_place.items() if place.parts[1] != "jobs"}


def equal_tables(ours: Path, theirs: Path) -> None:
    assert_frame_equal(read_parquet(ours), read_parquet(theirs), check_exact=True)


def equal_weights(ours: Path, theirs: Path) -> None:
    first, second = load_file(ours), load_file(theirs)
    assert all(torch.equal(first[name], second[name]) for name in first | second), ours


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_train_and_measure_with_the_bits_of_processes_of_one_machine(kind, stories, here):
    story = stories[kind].result()
    assert states(story.sweep)[-1] == "COMPLETED", story.output + story.log
    assert "training on 2 processes, one in each task of the job" in story.log
    for pattern, equal in (("*/*/*.parquet", equal_tables), ("*/*/step-*/*.safetensors", equal_weights)):
        ours, theirs = files(story.place.home, pattern), files(here[kind], pattern)
        assert ours.keys() == theirs.keys() and len(ours) >= 2
        for place, path in ours.items():
            equal(path, theirs[place])


@pytest.mark.parametrize("kind", KINDS)
def test_they_have_one_record_and_one_mlflow_run_however_often_they_are_interrupted(kind, stories):
    story = stories[kind].result()
    assert steps(story.sweep) == list(range(1, STEPS + 1))
    assert story.place.statuses(kind) == ("FINISHED", {"3": "FINISHED"})
    expected = {
        "copies": ["RUNNING", "FAILED", "RUNNING", "RUNNING", "COMPLETED"],
        "parts": ["RUNNING", "INTERRUPTED", "RUNNING", "COMPLETED"],
    }
    assert states(story.sweep) == expected[kind]
    assert len(re.findall(r"resuming from step \d+", story.log)) == {"copies": 2, "parts": 1}[kind]
    assert rows(story.place.command("status", story.sweep)) == {0: "COMPLETED"}


def test_a_killed_task_ends_the_job_with_a_sentence_and_leaves_nothing(stories):
    story = stories["copies"].result()
    error = events(story.sweep)[1]["error"]
    assert "process 2 of 2 of the training (task 1 on n" in error
    assert "ended with its task" in error and "`weightgeom sweep resubmit` resumes" in error
    assert error in story.output and story.shown == {0: "FAILED"}
    assert story.left == []


def test_a_requested_stop_loses_no_step(stories):
    story = stories["parts"].result()
    (paused,) = [event for event in events(story.sweep) if event["state"] == "INTERRUPTED"]
    stopped = re.search(r"stopped after step (\d+); its state is saved", paused["error"])
    assert stopped is not None and f"resuming from step {stopped[1]}" in story.log
