"""Interrupted trainings that go on, in processes that are killed, against one that was not."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file

from runners.pipeline.logged_stages import Stages
from runners.tracking.record import Record
from weightgeom.interfaces import Log, Objective
from weightgeom.interruption import Interrupted, Request, no_request
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.graded_contrastive import GradedContrastive
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit
from weightgeom.training.resuming import SEAL, resume_states

# 24 pairs in batches of 4, two to a step: three steps an epoch, so that 11 steps are almost four epochs.
TRAINING = Training(
    steps=11,
    batch_size=4,
    accumulate=2,
    learning_rate=1e-3,
    max_length=48,
    log_every=2,
    save_every=2,
    workers=1,
)
OBJECTIVES = {
    "text": CE("text"),
    "chosen": CE("chosen"),
    "dpo": DPO(),
    "graded tokens": GradedContrastive(level="token", negatives=7, tau=0.1, source="unigram"),
    "graded sequences": GradedContrastive(negatives=2),
}


class Ended(Exception):
    """Stands for anything that ends a process from within."""


class Curves(small.Curves):
    """Ends the training, or the process, when a step is reported."""

    def __init__(self, at: int | None = None, kill: bool = False) -> None:
        super().__init__()
        self.at, self.kill = at, kill

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        super().__call__(metrics, step)
        if step == self.at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Ended


def train(
    directory: Path,
    objective: Objective,
    curves: Curves | None = None,
    training: Training = TRAINING,
    examples: Examples | None = None,
    request: Request = no_request,
) -> Curves:
    """Train a network with dropout, so that the state of the random generators matters."""
    tokenizer = small.WORLD.tokenizer()
    network = small.network(tokenizer, dropout=0.1)
    start = directory.parent / "start"
    if not start.exists():
        network.save_pretrained(start)
    curves = curves or Curves()
    options: dict[str, Any] = {
        "name": "it",
        "seed": 0,
        "device": "cpu",
        "log_metrics": curves,
        "start": start,
        "request": request,
    }
    # Whatever this process has drawn before must not matter.
    random.seed(os.getpid())
    np.random.seed(os.getpid() % 1000)
    torch.manual_seed(os.getpid())
    fit(objective, network, tokenizer, examples or small.WORLD.examples(), training, directory, **options)
    return curves


def killed(directory: Path, name: str, at: int) -> None:
    """Train in a process of its own, which kills itself by SIGKILL as it reports step `at`."""
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(directory, OBJECTIVES[name], Curves(at, kill=True))
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def assert_equal_trajectories(directory: Path, other_directory: Path) -> None:
    """All weights of all checkpoints are equal bit for bit, and no state is left."""
    names = {path.name for path in directory.glob("step-*")}
    assert names == {path.name for path in other_directory.glob("step-*")} and "step-11" in names
    for name in names:
        first, second = (
            load_file(place / name / "model.safetensors") for place in (directory, other_directory)
        )
        assert first.keys() == second.keys()
        for key, weight in first.items():
            assert torch.equal(weight, second[key]), (name, key)
    assert not resume_states(directory) and not resume_states(other_directory)
    assert json.loads((directory / "matching.json").read_text()) == json.loads(
        (other_directory / "matching.json").read_text()
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Curves]]:
    """Each objective's uninterrupted training, with its curves."""
    made = {}
    for name, objective in OBJECTIVES.items():
        directory = tmp_path_factory.mktemp(name) / "whole"
        made[name] = directory, train(directory, objective)
    return made


def test_states_change_nothing_and_dropout_is_on(whole, tmp_path):
    train(tmp_path / "plain", CE("text"), training=replace(TRAINING, save_every=None, workers=0))
    assert_equal_trajectories(whole["text"][0], tmp_path / "plain")
    network = small.network(small.WORLD.tokenizer(), dropout=0.1)
    assert not torch.equal(*(network(torch.arange(9)[None]).logits for _ in "ab"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_that_was_killed_twice_ends_in_the_same_bits(name, whole, tmp_path):
    cut = tmp_path / "cut"
    killed(cut, name, 5)  # in the middle of two states and of an epoch
    assert [path.name for path in resume_states(cut)] == ["checkpoint-4", "checkpoint-2"]
    killed(cut, name, 8)  # as the state of step 8 is about to be saved
    assert [path.name for path in resume_states(cut)] == ["checkpoint-6", "checkpoint-4"]
    curves = train(cut, OBJECTIVES[name])
    assert_equal_trajectories(whole[name][0], cut)
    assert list(curves.by_step) == [7, 8, 9, 10, 11]
    expected = whole[name][1].by_step
    assert all(metrics == expected[step] for step, metrics in curves.by_step.items())


@pytest.mark.parametrize("at", [1, 3, 6, 11])
def test_a_training_that_an_exception_ended_at_any_step_ends_in_the_same_bits(at, whole, tmp_path):
    # Steps 3 and 6 end an epoch; at step 1 there is no state yet; step 11 is the last.
    cut = tmp_path / "cut"
    with pytest.raises(Ended):
        train(cut, DPO(), Curves(at))
    curves = train(cut, DPO())
    assert min(curves.by_step) == {1: 1, 3: 3, 6: 5, 11: 11}[at]
    assert_equal_trajectories(whole["dpo"][0], cut)


def asked(what: Literal["save", "stop"], after: int) -> Request:
    """Asks for something once, after so many steps from where the training starts or goes on."""
    step = 0

    def request() -> Literal["save", "stop"] | None:
        nonlocal step
        step += 1
        return what if step == after else None

    return request


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_stopped_on_request_saves_its_step_and_resumes_to_the_same_bits_and_curves(
    name, whole, tmp_path
):
    cut = tmp_path / "cut"
    never = replace(TRAINING, save_every=None)  # so that there is no state but that of the stop
    curves = Curves()
    for after, last in ((5, 5), (2, 7)):  # step 5 lies between two log lines, 7 behind one
        with pytest.raises(Interrupted, match=f"stopped after step {last}; its state is saved"):
            train(cut, OBJECTIVES[name], curves, never, request=asked("stop", after))
        assert resume_states(cut)[0].name == f"checkpoint-{last}"
        assert max(curves.by_step) == last
    train(cut, OBJECTIVES[name], curves, never)
    assert_equal_trajectories(whole[name][0], cut)
    assert curves.by_step == whole[name][1].by_step


def test_a_training_continues_after_a_requested_save_and_can_resume_from_it(whole, tmp_path):
    cut, never = tmp_path / "cut", replace(TRAINING, save_every=None)
    with pytest.raises(Ended):
        train(cut, DPO(), Curves(5), never, request=asked("save", 3))
    assert [path.name for path in resume_states(cut)] == ["checkpoint-3"]
    curves = train(cut, DPO(), None, never)
    assert min(curves.by_step) == 4
    assert_equal_trajectories(whole["dpo"][0], cut)


def test_a_stop_requested_at_the_last_step_ends_the_training_normally(whole, tmp_path):
    train(tmp_path / "cut", DPO(), request=asked("stop", 11))
    assert_equal_trajectories(whole["dpo"][0], tmp_path / "cut")


def test_states_between_two_log_lines_leave_the_curves_as_they_are(whole, tmp_path):
    cut, odd = tmp_path / "cut", replace(TRAINING, save_every=3)
    curves = Curves(5)
    with pytest.raises(Ended):
        train(cut, DPO(), curves, odd)
    assert [path.name for path in resume_states(cut)] == ["checkpoint-3"]
    curves.at = None
    train(cut, DPO(), curves, odd)
    assert_equal_trajectories(whole["dpo"][0], cut)
    assert curves.by_step == whole["dpo"][1].by_step


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    **{
        f"{name} is not the file that was written": lambda state, name=name: flip(state / name)
        for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "../step-4/model.safetensors")
    },
    "model.safetensors has": lambda state: truncate(state / "model.safetensors"),
    "optimizer.pt has": lambda state: truncate(state / "optimizer.pt"),
    "trainer_state.json has": lambda state: truncate(state / "trainer_state.json"),
    "rng_state.pth is missing": lambda state: (state / "rng_state.pth").unlink(),
    "sealed.json is missing": lambda state: (state / SEAL).unlink(),
    "Expecting value": lambda state: (state / SEAL).write_text(""),
    "maximum recursion depth": lambda state: (state / SEAL).write_text("[" * 100_000),
    "step-4 is missing": lambda state: shutil.rmtree(state.parent / "step-4"),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that ended at step 5, with states of steps 4 and 2."""
    directory = tmp_path_factory.mktemp("interrupted") / "cut"
    with pytest.raises(Ended):
        train(directory, DPO(), Curves(5))
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_logged_and_the_state_before_is_used(damage, interrupted, whole, tmp_path, caplog):
    shutil.copytree(interrupted.parent, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "cut"
    DAMAGES[damage](cut / "checkpoint-4")
    with caplog.at_level(logging.INFO):
        curves = train(cut, DPO())
    assert f"checkpoint-4: {damage}" in caplog.text and "resuming from step 2" in caplog.text
    assert min(curves.by_step) == 3
    assert_equal_trajectories(whole["dpo"][0], cut)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "lion"])
def test_a_training_by_any_optimizer_resumes_to_the_same_bits(optimizer, tmp_path):
    asked = replace(TRAINING, optimizer=optimizer, warmup=3, schedule="cosine", weight_decay=0.1)
    train(tmp_path / "whole", CE("chosen"), training=asked)
    cut = tmp_path / "cut"
    for last in (5, 8):
        with pytest.raises(Ended):
            train(cut, CE("chosen"), Curves(last), asked)
    curves = train(cut, CE("chosen"), None, asked)
    assert min(curves.by_step) == 7
    assert_equal_trajectories(tmp_path / "whole", cut)


def test_without_a_whole_state_it_starts_afresh(interrupted, whole, tmp_path, caplog):
    shutil.copytree(interrupted.parent, tmp_path, dirs_exist_ok=True)
    for state in resume_states(tmp_path / "cut"):
        truncate(state / "scheduler.pt")
    curves = train(tmp_path / "cut", DPO())
    assert min(curves.by_step) == 1 and caplog.text.count("scheduler.pt has") == 2
    assert_equal_trajectories(whole["dpo"][0], tmp_path / "cut")


def test_the_reference_of_a_resumed_dpo_is_the_base(interrupted, tmp_path):
    shutil.copytree(interrupted.parent, tmp_path, dirs_exist_ok=True)
    made = []

    class Watched(DPO):
        def trainer(self, network, tokenizer, examples, arguments):
            made.append(super().trainer(network, tokenizer, examples, arguments))
            return made[-1]

    train(tmp_path / "cut", Watched())
    base = small.network(small.WORLD.tokenizer())
    reference = dict(made[0].ref_model.named_parameters())
    assert all(torch.equal(reference[name], weight) for name, weight in base.named_parameters())


def test_a_training_of_which_nothing_is_to_be_resumed_leaves_no_states(tmp_path):
    with pytest.raises(Ended):
        train(tmp_path / "cut", CE("text"), Curves(5), replace(TRAINING, save_every=None))
    assert not resume_states(tmp_path / "cut")


def test_a_training_that_cannot_be_resumed_exactly_is_refused(tmp_path):
    moving = DPO(options={"sync_ref_model": True})
    with pytest.raises(
        ValueError, match=r"save_every cannot restore a reference that moves \(sync_ref_model\)"
    ):
        train(tmp_path / "cut", moving)


def rows(directory: Path) -> list[dict[str, Any]]:
    """The log of a stage, without the time."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def test_an_interrupted_stage_resumes_without_gaps_or_duplicate_steps_in_its_metrics(tmp_path):
    def record_in(outputs: Path) -> Record:
        asked: dict[str, Any] = {"params": {}, "tags": {}, "inputs": [], "tracking_uri": "sqlite:///none"}
        return Record.create(outputs / "record", experiment="e", name="n", **asked)

    def made(outputs: Path, at: int | None) -> Path:
        def work(directory: Path, log_metrics: Log) -> None:
            class Passed(Curves):
                def __call__(self, metrics: Mapping[str, float], step: int) -> None:
                    log_metrics(metrics, step)
                    super().__call__(metrics, step)

            train(directory, DPO(), Passed(at))

        # A job that is requeued continues its own record.
        make = Stages(outputs, record_in(outputs), "train", "code")
        return make("training", {"seed": 0}, work, TRAINING.steps)

    whole = made(tmp_path / "whole", None)
    with pytest.raises(Ended):
        made(tmp_path / "cut", 9)
    (failed,) = (tmp_path / "cut" / "training").glob("*/FAILED")
    with (failed.parent / "metrics.jsonl").open("a") as file:
        file.write('{"metrics": {"loss"')  # as a kill leaves it
    truncate(failed.parent / "checkpoint-8" / "optimizer.pt")  # so that steps 7 and 8 are done again
    cut = made(tmp_path / "cut", None)
    assert rows(cut) == rows(whole) and [row["step"] for row in rows(cut)] == [1, 2, 4, 6, 8, 10]
    assert_equal_trajectories(whole, cut)
    assert not (cut / "FAILED").exists() and (cut / "DONE").exists()
    reused = made(tmp_path / "cut", 1)
    assert reused == cut
    first, second = (
        [point[:3] for batch, _ in record_in(tmp_path / name).batches(0, 10**6) for point in batch]
        for name in ("whole", "cut")
    )
    assert len(first) == len(second) and set(first) == set(second)
