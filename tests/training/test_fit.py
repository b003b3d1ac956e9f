import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from weightgeom.models.residual import architecture_of
from weightgeom.objectives.ce import CE
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import fit, saved_trajectory
from weightgeom.trajectory import Trajectory

FAST = Training(steps=5, batch_size=4, learning_rate=1e-3, max_length=32, log_every=2)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return small.WORLD.examples()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return small.WORLD.tokenizer()


def run(
    directory: Path,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    training: Training = FAST,
    objective: Any = None,
    seed: int = 0,
    start: Path | None = None,
    log: Any = None,
):
    return fit(
        objective or CE("text"),
        small.network(tokenizer),
        tokenizer,
        examples,
        training,
        directory,
        name="a small network",
        seed=seed,
        device="cpu",
        log_metrics=log or small.Curves(),
        start=start,
    )


@pytest.fixture(scope="module")
def curves() -> small.Curves:
    """Of `trained`."""
    return small.Curves()


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    curves: small.Curves,
) -> Trajectory:
    return run(tmp_path_factory.mktemp("trained"), examples, tokenizer, log=curves)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [0, 1]), (8, [0, 1, 2, 4, 8]), (600, [0, *(2**n for n in range(10)), 600])]
)
def test_checkpoints_stand_at_the_powers_of_two_and_at_the_last_step(steps, expected):
    assert Training(steps=steps).save_steps() == expected


def test_every_checkpoint_is_a_transformers_directory_in_fp32_and_step_0_is_the_start(trained, tokenizer):
    assert list(trained.steps) == [0, 1, 2, 4, 5] and trained.last == 5 and trained.from_random
    for directory in trained.steps.values():
        weights = load_file(directory / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert AutoTokenizer.from_pretrained(directory).get_vocab() == tokenizer.get_vocab()
    start = AutoModelForCausalLM.from_pretrained(trained.steps[0]).state_dict()
    for name, weight in small.network(tokenizer).state_dict().items():
        assert torch.equal(weight, start[name]), name
    assert saved_trajectory(trained.steps[0].parent, "pretraining").steps == trained.steps


def test_a_given_start_is_not_saved_again(tmp_path, examples, tokenizer):
    small.network(tokenizer).save_pretrained(tmp_path / "base")
    trained = run(tmp_path / "training", examples, tokenizer, start=tmp_path / "base")
    assert trained.steps[0] == tmp_path / "base" and not trained.from_random
    assert not (tmp_path / "training" / "step-0").exists()


def test_one_step_of_sgd_like_size_moves_weights_by_at_most_the_learning_rate(tmp_path, examples, tokenizer):
    # Adam's first step is lr * g / (|g| + eps): no entry moves by more than the learning rate.
    trained = run(tmp_path, examples, tokenizer, replace(FAST, steps=1, learning_rate=1e-3))
    before, after = (load_file(trained.steps[step] / "model.safetensors") for step in (0, 1))
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0.9e-3 < moved <= 1.001e-3


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(trained, tmp_path, examples, tokenizer):
    others = [run(tmp_path / str(seed), examples, tokenizer, seed=seed) for seed in (0, 1)]
    ends = [load_file(trajectory.steps[5] / "model.safetensors") for trajectory in (trained, *others)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_curves_come_at_the_first_step_and_every_few_and_progress_at_each(trained, curves, tokenizer):
    assert list(curves.by_step) == [1, 2, 3, 4, 5]
    assert [step for step, metrics in curves.by_step.items() if "loss" in metrics] == [1, 2, 4]
    # A random network of small weights predicts almost uniformly: its loss is near ln V.
    assert curves.by_step[1]["loss"] == pytest.approx(math.log(len(tokenizer)), abs=0.1)


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_good_checkpoints(
    tmp_path, examples, tokenizer
):
    wild = replace(FAST, steps=8, learning_rate=1e30, log_every=1)
    with pytest.raises(
        FloatingPointError, match=r"training diverged: .* at step \d; the last good checkpoint"
    ):
        run(tmp_path, examples, tokenizer, wild)
    kept = saved_trajectory(tmp_path, "x")
    assert kept.steps and kept.last < 8
    for directory in kept.steps.values():
        assert all(weight.isfinite().all() for weight in load_file(directory / "model.safetensors").values())


def test_a_checkpoint_that_cannot_be_finished_leaves_nothing_behind(tmp_path, examples):
    tokenizer = small.WORLD.tokenizer()
    saved = tokenizer.save_pretrained

    def fails_at_step_2(directory: Path, **options: Any):
        if "step-2" in str(directory):
            raise OSError(28, "No space left on device")
        return saved(directory, **options)

    tokenizer.save_pretrained = fails_at_step_2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, examples, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".step", "step"))) == [
        "step-0",
        "step-1",
    ]


def test_a_first_loss_that_the_objective_does_not_expect_is_refused(tmp_path, examples, tokenizer):
    class Mistaken(CE):
        @property
        def first_loss(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
            return 0.5

    with pytest.raises(RuntimeError, match=r"the first loss is 5\.\d+ instead of 0\.5000"):
        run(tmp_path, examples, tokenizer, objective=Mistaken("text"))


def test_sequences_longer_than_the_model_takes_are_refused(tmp_path, examples, tokenizer):
    with pytest.raises(ValueError, match="max_length is 129 tokens and the model takes 128"):
        run(tmp_path, examples, tokenizer, replace(FAST, max_length=129))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": -1.0}, {"batch_size": "many"}])
def test_values_out_of_range_are_refused_when_the_training_is_described(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Training(**wrong)


def test_norms_of_gradients_by_kind_are_those_of_the_first_loss_before_clipping(
    tmp_path, examples, tokenizer
):
    curves = small.Curves()
    training = replace(FAST, steps=3, log_gradients=True, max_grad_norm=0.01)
    run(tmp_path, examples, tokenizer, training, log=curves)
    network = small.network(tokenizer)
    trainer = CE("text").trainer(network, tokenizer, examples, FAST.arguments(tmp_path / "x", 0, "cpu"))
    trainer.compute_loss(network, next(iter(trainer.get_train_dataloader()))).backward()  # pyright: ignore[reportCallIssue, reportArgumentType, reportAttributeAccessIssue]
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    squares: dict[str, float] = {}
    for matrix in architecture_of(network.config).matrices:
        squares[matrix.kind] = squares.get(matrix.kind, 0.0) + float(matrix.of(gradients).square().sum())
    logged = {key: value for key, value in curves.by_step[1].items() if key.startswith("grad_norm/")}
    assert logged == {
        f"grad_norm/{kind}": pytest.approx(square**0.5, rel=1e-4) for kind, square in squares.items()
    }
    assert curves.by_step[1]["grad_norm"] > 0.1  # so that it was clipped
    assert "grad_norm/q" in curves.by_step[2] and "grad_norm/q" not in curves.by_step[3]
