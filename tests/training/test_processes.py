"""Trainings on two real processes (gloo) against the same training on one."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import small
import together
import torch
from app import BEHAVIOUR, ROOT, WORLD, environment, run
from safetensors.torch import load_file
from sweeps import until

from weightgeom.interfaces import Objective
from weightgeom.interruption import Interrupted
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.training.config import Training
from weightgeom.training.processes import check_gpus, fit_on_processes, load_on, run_on_processes
from weightgeom.training.ranks import from_first, is_first, of_all, part, processes, whole
from weightgeom.training.resuming import SUMS, check_shards, resume_states

# 24 pairs in batches of 4, two to a step: three steps an epoch. SGD, because AdamW divides the gradients that
# are zero but for rounding, such as those of key biases, by themselves.
ONE = Training(
    steps=4,
    batch_size=4,
    accumulate=2,
    optimizer="sgd",
    learning_rate=0.1,
    max_length=48,
    log_every=1,
)
# With moments, which a state to resume from has as well.
MOMENTS = replace(ONE, steps=5, optimizer="adamw", learning_rate=1e-3, save_every=2)
STOPPED = replace(ONE, save_every=4)
EXAMPLES = small.WORLD.examples()
TRAININGS: dict[str, tuple[Objective, Training]] = {
    "dpo": (DPO(), ONE),
    "precomputed": (DPO(precompute_reference=True), ONE),
    "chosen": (CE("chosen"), ONE),
    "text": (CE("text"), ONE),
    "recomputed": (CE("chosen"), replace(ONE, activation_checkpointing=True)),
    "bf16": (CE("chosen"), replace(ONE, precision="bf16")),
    "tied": (CE("chosen"), ONE),
}
KINDS = {"copies": {"processes": 2}, "parts": {"processes": 2, "shard": True}}


class Trainings:
    """Trainings on one process and on two, each of a kind of processes in a directory of its own.

    Starting processes takes most of the time: those on two are one after another in the same processes, which
    are killed, or asked to stop, in the last of them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.curves: dict[str, dict[int, dict[str, float]]] = {}
        self.errors: dict[str, BaseException] = {}
        self.left: list[Any] = []  # processes that outlived their training
        self.kill = self.stop = ""  # the training that is ended, at its third step or after its second
        self.last = ("", 0)
        self.steps: dict[str, list[int]] = {}
        tokenizer = small.WORLD.tokenizer()
        for name in ("base", "tied"):
            small.network(tokenizer, tied=name == "tied").save_pretrained(directory / name)
            tokenizer.save_pretrained(directory / name)

    def task(self, kind: str, name: str, objective: Objective, training: Training) -> together.Task:
        training = replace(training, **KINDS.get(kind, {}))
        base = self.directory / ("tied" if name == "tied" else "base")
        return together.Task(objective, training, base, EXAMPLES, self.directory / f"{kind} {name}")

    def on_one(self, *tasks: together.Task) -> None:
        try:
            together.train(tasks, self.log, self.request)
        except Interrupted as error:
            self.errors[tasks[-1].directory.name] = error

    def on_two(self, *tasks: together.Task) -> None:
        try:
            work = partial(together.train, tasks)
            run_on_processes(work, 2, "cpu", self.log, self.request, trusted_directory=None)
        except (Interrupted, ChildProcessError) as error:
            self.errors[tasks[-1].directory.name] = error
        self.left += multiprocessing.active_children()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        name = next(iter(metrics)).partition("|")[0]
        if self.last != (name, step):
            self.steps.setdefault(name, []).append(step)
        self.last = name, step
        logged = {key.partition("|")[2]: value for key, value in metrics.items()}
        self.curves.setdefault(name, {}).setdefault(step, {}).update(logged)
        if self.last == (self.kill, 3):
            (second,) = (child for child in multiprocessing.active_children() if child.name == "training-1")
            assert second.pid is not None
            os.kill(second.pid, signal.SIGKILL)
            self.kill = ""

    def request(self) -> Any:
        return "stop" if self.last == (self.stop, 2) else None

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return weights(self.directory / name)

    def assert_same(self, run: str, other: str, tolerance: float) -> None:
        first, second = self.weights(run), self.weights(other)
        assert first and first.keys() == second.keys()
        for name, weight in first.items():
            assert second[name].dtype == weight.dtype == torch.float32
            torch.testing.assert_close(second[name], weight, rtol=0, atol=tolerance, msg=name)
        assert not resume_states(self.directory / run) and not resume_states(self.directory / other)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("step-*/model.safetensors"))
    return {f"{path.parent.name} {key}": value for path in files for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """`TRAININGS` on one process and on two."""
    done = Trainings(tmp_path_factory.mktemp("trainings"))
    done.on_one(*(done.task("one", name, *parts) for name, parts in TRAININGS.items()))
    done.on_two(*(done.task(kind, name, *parts) for kind in KINDS for name, parts in TRAININGS.items()))
    return done


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Trainings that are ended and then resumed, in processes that are started four times."""
    done = Trainings(tmp_path_factory.mktemp("ended"))
    done.on_one(done.task("one", "chosen", *TRAININGS["chosen"]))
    whole, cut = (
        {kind: done.task(kind, name, DPO(), MOMENTS) for kind in KINDS} for name in ("whole", "cut")
    )
    to_one, to_two = (
        {kind: done.task(kind, name, CE("chosen"), STOPPED) for kind in ("one", "copies")}
        for name in ("to one", "to two")
    )
    to_one["one"] = replace(to_one["one"], directory=to_one["copies"].directory)
    to_two["copies"] = replace(to_two["copies"], directory=to_two["one"].directory)
    done.kill = "copies cut"
    done.on_two(*whole.values(), cut["copies"])
    done.kill = "parts cut"
    done.on_two(cut["copies"], cut["parts"])
    done.stop = "copies to one"
    done.on_two(cut["parts"], to_one["copies"])
    done.stop = "one to two"
    done.on_one(to_two["one"])
    done.stop = ""
    done.on_one(to_one["one"])
    done.on_two(to_two["copies"])
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one_does(name, kind, done):
    tolerance = 2e-3 if name == "bf16" else 1e-5
    done.assert_same(f"one {name}", f"{kind} {name}", tolerance)
    by_one, two = done.curves[f"one {name}"], done.curves[f"{kind} {name}"]
    assert list(two) == list(by_one) == [1, 2, 3, 4]
    for step, metrics in by_one.items():
        assert two[step].keys() == metrics.keys()
        assert abs(two[step]["loss"] - metrics["loss"]) < (2e-2 if name == "bf16" else 1e-6), step
    places = [done.directory / f"{which} {name}" for which in ("one", kind)]
    first, second = (json.loads((place / "matching.json").read_text()) for place in places)
    relative = 1e-2 if name == "bf16" else 1e-4
    assert second == {**first, "delta_norm": pytest.approx(first["delta_norm"], rel=relative)}
    first, second = ((place / "step-4" / "config.json").read_text() for place in places)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_a_reference_computed_first_and_activations_computed_twice_change_nothing(kind, done):
    done.assert_same(f"{kind} dpo", f"{kind} precomputed", 1e-6)
    done.assert_same(f"{kind} chosen", f"{kind} recomputed", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_bf16_rounds_the_loss_and_not_the_weights(kind, done):
    exact, rounded = (done.curves[f"{kind} {name}"][1]["loss"] for name in ("chosen", "bf16"))
    assert 0 < abs(exact - rounded) < 2e-2
    for weight in done.weights(f"{kind} bf16").values():
        assert weight.dtype == torch.float32
    last = done.weights(f"{kind} bf16")["step-4 gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    assert not torch.equal(last, last.bfloat16().float())  # the updates are not rounded


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_ends_the_training_which_resumes_to_the_same_bits(kind, ended):
    error = ended.errors[f"{kind} cut"]
    assert isinstance(error, ChildProcessError)
    assert "process 2 of 2 of the training was killed by SIGKILL" in str(error)
    assert "the same command resumes" in str(error)
    assert not ended.left
    # It was killed after step 3, with a state of step 2: the same step comes again, which is kept once.
    assert ended.steps[f"{kind} cut"] == [1, 2, 3, 4, 5]
    ended.assert_same(f"{kind} whole", f"{kind} cut", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copies to one", "one to two"])
def test_a_requested_stop_saves_a_state_that_another_number_of_processes_goes_on_from(name, ended):
    assert "stopped after step 2; its state is saved" in str(ended.errors[name])
    assert ended.steps[name] == list(ended.curves[name]) == [1, 2, 3, 4]
    ended.assert_same("one chosen", name, 1e-5)


@pytest.mark.slow
def test_the_error_of_a_process_is_raised_and_nothing_is_left(tmp_path, caplog):
    base = Trainings(tmp_path).directory / "base"
    training = replace(ONE, processes=2, learning_rate=1e30, max_grad_norm=1e30)
    options: dict[str, Any] = {"name": "it", "seed": 0, "device": "cpu", "start": base}
    load = partial(load_on, base, "cpu", False)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(FloatingPointError, match=r"training diverged: .* lower training.learning_rate"),
    ):
        fit_on_processes(
            CE("chosen"), load, EXAMPLES, training, tmp_path / "cut", **options, log_metrics=small.Curves()
        )
    assert not multiprocessing.active_children()
    assert caplog.text.count("training it for 4 steps of 4 examples") == 1  # the first process speaks


def has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE  # of init, which has yet to take note
    return True


@pytest.mark.slow
def test_a_terminated_run_ends_its_workers_resumes_and_each_time_has_one_record(tmp_path):
    more = ["training.processes=2", "training.steps=40", "training.save_every=1", "training.log_every=20"]
    asked = [*BEHAVIOUR, *WORLD, "objective=ce", *more]
    cut = tmp_path / "cut"
    command = [sys.executable, str(ROOT / "run.py"), *asked, f"outputs={cut}"]
    with (tmp_path / "log").open("w") as log:
        begun = subprocess.Popen(command, cwd=tmp_path, env=environment({}), stdout=log, stderr=log)
    while not list(cut.glob("training/*/checkpoint-*/sealed.json")):
        assert begun.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    workers = psutil.Process(begun.pid).children()
    begun.terminate()
    assert begun.wait(300) == 128 + signal.SIGTERM
    assert len(workers) >= 2
    until(lambda: all(map(has_ended, workers)), 60)
    (status,) = cut.rglob("status.json")
    assert json.loads(status.read_text())["status"] == "KILLED"
    again = run(tmp_path, *asked, f"outputs={cut}")
    assert again.code == 0 and "resuming from step" in again.out + again.err
    assert len(list(cut.rglob("status.json"))) == 2
    assert any(path.name == "step-40" for path in cut.glob("training/*/step-*"))


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


def test_activations_are_computed_twice(tmp_path):
    base, calls = Trainings(tmp_path).directory / "base", {}
    for name in ("chosen", "recomputed"):
        network, tokenizer = load_on(base, "cpu", shard=False)
        arguments = {**TRAININGS[name][1].arguments(tmp_path, 0, "cpu"), "max_steps": 1}
        counted = calls[name] = []
        first: Any = network.get_submodule("gpt_neox.layers.0.input_layernorm")
        first.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        CE("chosen").trainer(network, tokenizer, EXAMPLES, arguments).train()
    assert len(calls["recomputed"]) == len(calls["chosen"]) + ONE.accumulate


def test_a_state_in_parts_is_resumed_by_as_many_parts_alone(tmp_path):
    (tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "checkpoint-3").mkdir()
    for step, shard in ((2, True), (3, False)):
        state = tmp_path / f"checkpoint-{step}"
        (state / SUMS).write_text("[{}, {}]")
        check_shards(state, shard, 2)
        message = rf"was saved with training.shard={str(shard).lower()}: set training.shard"
        with pytest.raises(ValueError, match=message):
            check_shards(state, not shard, 2)
    check_shards(state, shard=False, number=1)
    with pytest.raises(ValueError, match=r"in the parts of 2 processes: set training.processes=2 to resume"):
        check_shards(tmp_path / "checkpoint-2", shard=True, number=4)
    check_shards(None, shard=True, number=2)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_gpus(1)
    with pytest.raises(ValueError, match=r"training.processes=2 takes 2 GPUs.* and torch sees 1"):
        check_gpus(2)


def test_outside_a_training_on_several_processes_there_is_one():
    weight = torch.ones(2)
    assert processes() == 1 and is_first() and from_first(lambda: 3) == 3 and of_all("a") == ["a"]
    assert part(weight) is weight and whole(weight) is weight
