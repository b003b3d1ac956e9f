"""A probe, an objective, an intervention and data that lie outside the repository, with their choices."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from app import BEHAVIOUR, Ended, done, run
from lab import change, write_lab
from sweeps import Place, directory

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
OWN = [
    *(override for override in BEHAVIOUR if not override.startswith("probe=")),
    "allow_targets=[mylab.*]",
    *"data=few model.vocabulary=300 probe=[norm,behaviour] intervention=[nudge]".split(),
]
STAGES = ("pretraining", "training", "norm", "behaviour", "nudge")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs work, with the user's code and choices in `lab`."""
    made = tmp_path_factory.mktemp("own")
    write_lab(made / "lab")
    return made


def measure(home: Path, *arguments: str) -> Ended:
    variables = {"PYTHONPATH": str(home / "lab")}
    ended = run(home, "--config-dir", str(home / "lab/conf"), *OWN, *arguments, **variables)
    assert ended.code == 0, ended.err + ended.out
    return ended


@pytest.fixture(scope="module")
def first(home: Path) -> Ended:
    return measure(home, "objective=chosen")


def made(home: Path, ended: Ended) -> dict[str, int]:
    """The number of stages of each kind that the newest run made, not reused: a probe has two tables."""
    wanted = {"pretraining": 1, "training": 1, "norm": 2, "behaviour": 2, "nudge": 1}
    reused = re.findall(rf"reusing {re.escape(str(home))}/outputs/(\w+)/\w+", ended.out)
    counts = {stage: wanted[stage] - reused.count(stage) for stage in STAGES}
    return {stage: count for stage, count in counts.items() if count}


def tables(record: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in (record / "artifacts/tables").glob("*.parquet")}


def test_they_run_as_those_of_the_house_do(home: Path, first: Ended) -> None:
    written = tables(first.record)
    assert set(written) == {"norm", "norm_pretraining", "behaviour", "behaviour_pretraining", "nudge"}
    assert set(written["norm"]["step"]) == {0, 1, 2} and min(written["norm"]["value"]) > 0
    assert "24 chosen responses: 0 dropped" in first.out
    (trained,) = done(home / "outputs", "training")
    assert json.loads((trained / "spec.json").read_text())["objective"]["class"] == "mylab.objective.Chosen"


def test_what_is_as_it_was_is_reused(home: Path, first: Ended) -> None:
    change(home / "lab/mylab/probe.py", "Norms of matrices", "The norms of matrices")
    change(home / "lab/mylab/unrelated.py", "SIZE = 1", "SIZE = 2")
    (home / "lab/mylab/unused.py").write_text("from mylab import probe\n")
    change(home / "lab/mylab/__init__.py", "import unrelated", "import unrelated, unused")
    assert made(home, measure(home, "objective=chosen")) == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "again"),
    [
        ("mylab/probe.py", "n=1", "n=2", {"norm": 2}),
        ("loose.py", "float(matrix.norm())", "2 * float(matrix.norm())", {"norm": 2}),
        ("mylab/intervention.py", "draw=0", "draw=1", {"nudge": 1}),
        (
            "mylab/objective.py",
            'train_on: str = "chosen"',
            'train_on: str = "chosen"\n    seen: int = 0',
            {"training": 1, "norm": 1, "behaviour": 1, "nudge": 1},
        ),
    ],
)
def test_what_was_edited_is_made_again_and_nothing_else(
    home: Path, first: Ended, file: str, old: str, new: str, again: dict[str, int]
) -> None:
    before = tables(max((home / "outputs/jobs").glob("*/*/record")))["norm"]["value"]  # the newest
    change(home / "lab" / file, old, new)
    ended = measure(home, "objective=chosen")
    assert made(home, ended) == again
    after = tables(ended.record)["norm"]["value"]
    factor = 2 if file == "loose.py" else 1  # which rounds nothing
    assert after.tolist() == [factor * value for value in before]


def test_a_sweep_runs_what_was_submitted_and_knows_the_choices(home: Path, first: Ended) -> None:
    known = len(done(home / "outputs", "norm"))
    ended = measure(home, "objective=chosen,ce", "+only.nudge=[chosen]", "hydra.launcher.detach=true", "-m")
    sweep = directory(ended)
    change(home / "lab/loose.py", "return", "raise ValueError(matrix)\n    return")  # before it is imported
    waited = Place(home).command("wait", sweep)
    change(home / "lab/loose.py", "raise ValueError(matrix)\n    return", "return")
    assert waited.code == 0, waited.out + waited.err
    assert set(tables(sweep / "0/record")) == {*tables(sweep / "1/record"), "nudge"}
    assert len(done(home / "outputs", "norm")) == known + 1  # of ce: the others were made by a run before
    copied = json.loads((sweep / "code/snapshot.json").read_text())["modules"]
    assert copied["modules/loose.py"] == str(home / "lab/loose.py")
    assert {Path(name).name for name in copied} >= {"probe.py", "objective.py", "intervention.py", "data.py"}
    assert not any("conf" in name for name in copied)


def test_what_failed_is_started_again_with_the_code_as_it_is_now_from_another_shell(
    home: Path, first: Ended
) -> None:
    change(home / "lab/loose.py", "return", "raise ValueError('no norm')\n    return")
    variables = {"PYTHONPATH": str(home / "lab")}
    ended = run(home, "--config-dir", f"{home}/lab/conf", *OWN, "objective=none", "-m", **variables)
    assert ended.code == 1 and "no norm" in ended.out
    sweep = directory(ended)
    change(home / "lab/loose.py", "raise ValueError('no norm')\n    return", "from later import")
    change(home / "lab/loose.py", "from later import", "from later import twice\n    return")
    (home / "lab/later.py").write_text("twice = 2\n")
    place = Place(home)
    assert place.command("resubmit", sweep, "--new-code").code == 0
    waited = place.command("wait", sweep)
    assert waited.code == 0, waited.out + waited.err
    assert (sweep / "code-2/modules/later.py").read_text() == "twice = 2\n"


def test_code_that_no_job_could_import_is_refused_before_anything_starts(tmp_path: Path) -> None:
    lab = write_lab(tmp_path / "lab")
    change(lab / "loose.py", "return", "retrun")
    ended = run(tmp_path, "--config-dir", f"{lab}/conf", *OWN, "-m", PYTHONPATH=str(lab))
    assert ended.code == 1 and f"{lab}/loose.py line 2 is not valid Python: invalid syntax" in ended.errors[0]
    assert not list(tmp_path.rglob("job.json"))
