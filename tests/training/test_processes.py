"""Trainings on two real processes (gloo) against the same training on one."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import small
import torch
from app import BEHAVIOUR, ROOT, WORLD, environment, run
from safetensors.torch import load_file

from weightgeom.interfaces import Objective
from weightgeom.interruption import Interrupted, Request, no_request
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.training.config import Training
from weightgeom.training.processes import check_gpus, fit_on_processes, load_on
from weightgeom.training.ranks import from_first, is_first, of_all, part, processes, whole
from weightgeom.training.resuming import check_shards, is_sharded_state, resume_states

# 24 pairs in batches of 4, two to a step: three steps an epoch. SGD, because AdamW divides the gradients that
# are zero but for rounding, such as those of key biases, by themselves.
ONE = Training(
    steps=5,
    batch_size=4,
    accumulate=2,
    optimizer="sgd",
    learning_rate=0.1,
    max_length=48,
    log_every=1,
    save_every=2,
)
TWO, SHARDED = replace(ONE, processes=2), replace(ONE, processes=2, shard=True)
EXAMPLES = small.WORLD.examples()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with its tokenizer, without dropout."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = small.WORLD.tokenizer()
    small.network(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def train(
    objective: Objective,
    base: Path,
    directory: Path,
    training: Training,
    log: Callable[[Mapping[str, float], int], None] | None = None,
    request: Request = no_request,
) -> small.Curves:
    curves = small.Curves()

    def log_metrics(metrics: Mapping[str, float], step: int) -> None:
        curves(metrics, step)
        if log is not None:
            log(metrics, step)

    options: dict[str, Any] = {"name": "it", "seed": 0, "device": "cpu", "start": base}
    load = partial(load_on, base, "cpu", training.shard)
    fit_on_processes(
        objective, load, EXAMPLES, training, directory, **options, log_metrics=log_metrics, request=request
    )
    return curves


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("step-*/model.safetensors"))
    return {f"{path.parent.name} {key}": value for path in files for key, value in load_file(path).items()}


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and any(name.startswith("step-5 ") for name in first)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=tolerance, msg=name)
    assert not resume_states(one) and not resume_states(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "precomputed", "chosen", "text"])
def test_two_processes_with_copies_or_with_parts_train_as_one_does(name, base, tmp_path):
    objectives = {
        "dpo": DPO(),
        "precomputed": DPO(precompute_reference=True),
        "chosen": CE("chosen"),
        "text": CE("text"),
    }
    one = train(objectives[name], base, tmp_path / "one", ONE)
    configs = []
    for training in (TWO, SHARDED):
        directory = tmp_path / f"sharded {training.shard}"
        two = train(objectives[name], base, directory, training)
        assert_same(tmp_path / "one", directory, 1e-5)
        assert list(two.by_step) == list(one.by_step) == [1, 2, 3, 4, 5]
        for step, metrics in one.by_step.items():
            assert two.by_step[step].keys() == metrics.keys()
            assert abs(two.by_step[step]["loss"] - metrics["loss"]) < 1e-6, step
        reports = [
            json.loads((place / "matching.json").read_text()) for place in (tmp_path / "one", directory)
        ]
        assert reports[0] == {**reports[1], "delta_norm": pytest.approx(reports[1]["delta_norm"], rel=1e-4)}
        configs.append((directory / "step-5" / "config.json").read_text())
    assert set(configs) == {(tmp_path / "one" / "step-5" / "config.json").read_text()}


@pytest.mark.slow
@pytest.mark.parametrize("training", [TWO, SHARDED], ids=["copies", "parts"])
def test_a_killed_process_ends_the_training_which_resumes_to_the_same_bits(training, base, tmp_path):
    train(DPO(), base, tmp_path / "whole", training)

    def kill(metrics: Mapping[str, float], step: int) -> None:
        if step == 4 and not metrics:
            (second,) = (child for child in multiprocessing.active_children() if child.name == "training-1")
            assert second.pid is not None
            os.kill(second.pid, signal.SIGKILL)

    sentence = r"process 2 of 2 of the training was killed by SIGKILL.* the same command resumes"
    with pytest.raises(ChildProcessError, match=sentence):
        train(DPO(), base, tmp_path / "cut", training, kill)
    assert not multiprocessing.active_children()
    oldest = resume_states(tmp_path / "cut")[-1]
    assert oldest.name == "checkpoint-2" and is_sharded_state(oldest) == training.shard
    curves = train(DPO(), base, tmp_path / "cut", training)
    assert min(curves.by_step) in (3, 5)  # the state of step 4 may be whole, or not
    assert_same(tmp_path / "whole", tmp_path / "cut", 0)


@pytest.mark.slow
def test_a_requested_stop_saves_a_state_that_another_number_of_processes_goes_on_from(base, tmp_path):
    train(CE("chosen"), base, tmp_path / "whole", ONE)
    for first, second in ((TWO, ONE), (ONE, TWO)):
        cut, steps = tmp_path / f"from {first.processes}", iter([None, None, "stop"])
        with pytest.raises(Interrupted, match="stopped after step 3; its state is saved"):
            train(CE("chosen"), base, cut, first, request=lambda steps=steps: next(steps))  # pyright: ignore[reportArgumentType]
        assert not multiprocessing.active_children()
        curves = train(CE("chosen"), base, cut, second)
        assert list(curves.by_step) == [4, 5]
        assert_same(tmp_path / "whole", cut, 1e-5)


@pytest.mark.slow
def test_the_error_of_a_process_is_raised_and_nothing_is_left(base, tmp_path, caplog):
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(FloatingPointError, match=r"training diverged: .* lower training.learning_rate"),
    ):
        train(CE("chosen"), base, tmp_path / "cut", replace(TWO, learning_rate=1e30, max_grad_norm=1e30))
    assert not multiprocessing.active_children()
    assert caplog.text.count("training it for 5 steps of 4 examples") == 1  # the first process speaks


@pytest.mark.slow
def test_a_terminated_run_ends_its_workers_resumes_and_each_time_has_one_record(tmp_path):
    more = ["training.processes=2", "training.steps=60", "training.save_every=1", "training.log_every=20"]
    asked = [*BEHAVIOUR, *WORLD, "objective=ce", *more]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "run.py"), *asked, f"outputs={cut}"]
    with (tmp_path / "log").open("w") as log:
        begun = subprocess.Popen(command, cwd=tmp_path, env=environment({}), stdout=log, stderr=log)
    while not list(cut.glob("training/*/checkpoint-*/sealed.json")):
        assert begun.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    workers = psutil.Process(begun.pid).children()
    begun.terminate()
    assert begun.wait(300) == 128 + signal.SIGTERM
    assert len(workers) >= 2 and not any(worker.is_running() for worker in workers)
    (status,) = cut.rglob("status.json")
    assert json.loads(status.read_text())["status"] == "KILLED"
    again = run(tmp_path, *asked, f"outputs={cut}")
    assert again.code == 0 and "resuming from step" in again.out + again.err
    assert len(list(cut.rglob("status.json"))) == 2
    assert run(tmp_path, *asked, f"outputs={whole}").code == 0
    (first,), (second,) = (list(outputs.glob("training/*")) for outputs in (cut, whole))
    assert first.name == second.name
    assert weights(first).keys() == weights(second).keys()
    assert all(torch.equal(weight, weights(second)[name]) for name, weight in weights(first).items())


def test_a_batch_is_divided_or_refused():
    with pytest.raises(ValueError, match=r"batch_size=24 does not divide among 5 processes: .*batch_size=25"):
        Training(processes=5)
    assert Training(processes=4).arguments(Path(), 0, "cpu")["per_device_train_batch_size"] == 24  # here


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": True}, "shard=true needs several processes"),
        ({"shard": True, "processes": 2, "optimizer": "muon"}, "orthogonalises whole matrices"),
        ({"shard": True, "processes": 2, "lora": {"r": 4}}, "trains few weights"),
    ],
)
def test_settings_that_parts_of_weights_do_not_allow_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Training(**settings)


def test_processes_parts_and_activations_leave_the_settings_of_the_result_alone():
    more = replace(ONE, processes=4, shard=True, activation_checkpointing=True)
    assert more.of_result == ONE and replace(more, precision="bf16").of_result != ONE


def test_a_state_in_parts_is_resumed_by_parts_alone(tmp_path):
    (tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "checkpoint-3").mkdir()
    for step, shard in ((2, True), (3, False)):
        check_shards(tmp_path / f"checkpoint-{step}", shard)
        message = rf"was saved with training.shard={str(shard).lower()}: set training.shard"
        with pytest.raises(ValueError, match=message):
            check_shards(tmp_path / f"checkpoint-{step}", not shard)
    check_shards(None, True)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_gpus(1)
    with pytest.raises(ValueError, match=r"training.processes=2 takes 2 GPUs.* and torch sees 1"):
        check_gpus(2)


def test_outside_a_training_on_several_processes_there_is_one():
    weight = torch.ones(2)
    assert processes() == 1 and is_first() and from_first(lambda: 3) == 3 and of_all("a") == ["a"]
    assert part(weight) is weight and whole(weight) is weight
