import json
import logging
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file

from weightgeom.interfaces import Objective, Setting
from weightgeom.models.loading import load
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.behaviour import Behaviour
from weightgeom.training.config import Training
from weightgeom.training.fit import fit
from weightgeom.training.matching import LENGTH, PAIRS

TRAINING = Training(steps=12, batch_size=4, learning_rate=3e-3, max_length=48, log_every=1)
EXAMPLES = small.WORLD.examples()


def trained(directory: Path, training: Training, objective: Objective, examples: Any = EXAMPLES):
    """Its report, its curves and its directory."""
    tokenizer = small.WORLD.tokenizer()
    network, curves = small.network(tokenizer), small.Curves()
    options: dict[str, Any] = {"name": "it", "seed": 0, "device": "cpu", "log_metrics": curves}
    trajectory = fit(objective, network, tokenizer, examples, training, directory, **options)
    return json.loads((directory / "matching.json").read_text()), curves.by_step, trajectory


def norm_between(start: Path, end: Path) -> float:
    before, after = (load_file(path / "model.safetensors") for path in (start, end))
    return sqrt(sum(float((after[name] - weight).double().square().sum()) for name, weight in before.items()))


@pytest.mark.parametrize("objective", [CE("chosen"), DPO()], ids=["ce", "dpo"])
def test_the_report_agrees_with_the_batches_and_with_the_saved_files(objective, tmp_path):
    # Six batches of four: all 24 pairs.
    training = replace(TRAINING, steps=3, accumulate=2, match="tokens", target=1e6)
    report, curves, trajectory = trained(tmp_path, training, objective)
    trainer = objective.trainer(
        small.network(small.WORLD.tokenizer()),
        small.WORLD.tokenizer(),
        EXAMPLES,
        training.arguments(tmp_path / "other", 0, "cpu"),
    )
    # Padding differs with the batches, the tokens that are none do not.
    tokens = sum(int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader())
    assert report["tokens"] == tokens == curves[3]["matched_tokens"]
    norm = norm_between(trajectory.steps[0], trajectory.steps[3])
    assert report["delta_norm"] == pytest.approx(norm, rel=1e-6) and norm > 0.1
    assert curves[3]["delta_norm"] == report["delta_norm"]
    assert report["steps"] == 3 and not report["reached"] and report["match"] == "tokens"


def test_the_accuracy_is_that_of_the_probe(tmp_path):
    training = replace(TRAINING, match="accuracy", target=1.0, match_every=100)
    report, curves, trajectory = trained(tmp_path, training, DPO())
    assert (PAIRS, LENGTH) == (Behaviour().pairs, Behaviour().pair_length)
    model = load(trajectory.steps[12], "cpu")
    start, end = (model.params(trajectory.steps[step]) for step in (0, 12))
    probe = Behaviour().measurement(Setting(model, start, end, False, EXAMPLES, 0))
    (accuracy,) = [row["value"] for row in probe(end) if row["quantity"] == "preference_accuracy"]
    assert report["accuracy"] == accuracy == curves[12]["heldout_accuracy"]


def test_matched_tokens_are_equal_within_a_step_whatever_the_objective(tmp_path):
    tokens = 600
    for name, objective in {"text": CE("text"), "chosen": CE("chosen"), "dpo": DPO()}.items():
        training = replace(TRAINING, match="tokens", target=float(tokens))
        report, _, trajectory = trained(tmp_path / name, training, objective)
        assert report["reached"] and 0 < report["steps"] < TRAINING.steps
        assert trajectory.last == report["steps"] and max(trajectory.steps) == report["steps"]
        # A step adds at most 4 · 2 sequences of 48 tokens.
        assert tokens <= report["tokens"] < tokens + 4 * 2 * 48


def test_a_matched_norm_is_reached_at_the_first_step_beyond_it(tmp_path):
    plain = replace(TRAINING, steps=8)
    report, curves, whole = trained(tmp_path / "whole", plain, DPO())
    assert report["match"] == "steps" and report["reached"] and "delta_norm" not in curves[8]
    norms = {step: norm_between(whole.steps[0], path) for step, path in whole.steps.items()}
    target = (norms[2] + norms[4]) / 2  # of steps 1, 2, 4 and 8: so it is reached at step 3 or 4
    report, _, matched = trained(tmp_path / "cut", replace(plain, match="delta_norm", target=target), DPO())
    assert report["steps"] in (3, 4) and report["delta_norm"] >= target
    assert norm_between(matched.steps[0], matched.steps[matched.last]) == pytest.approx(report["delta_norm"])
    matched_weights, other = (
        load_file(path / "model.safetensors") for path in (matched.steps[2], whole.steps[2])
    )
    assert all(
        torch.equal(matched_weights[name], other[name]) for name in matched_weights
    )  # measuring changes nothing


def test_a_matched_accuracy_is_measured_every_few_steps_and_ends_the_training(tmp_path):
    training = replace(TRAINING, match="accuracy", target=0.8, match_every=3, steps=60)
    report, _, trajectory = trained(tmp_path, training, DPO())
    assert report["reached"] and report["accuracy"] >= 0.8
    assert report["steps"] % 3 == 0 and trajectory.last == report["steps"] < 60


def test_a_target_out_of_reach_costs_a_warning_and_no_result(tmp_path, caplog):
    training = replace(TRAINING, steps=2, match="delta_norm", target=1e6)
    with caplog.at_level(logging.INFO):
        report, _, trajectory = trained(tmp_path, training, CE("text"), replace(EXAMPLES, heldout_pairs=[]))
    assert not report["reached"] and report["accuracy"] is None and trajectory.last == 2
    assert "instead of its target 1e+06 within 2 steps: raise training.steps" in caplog.text
    assert "stopped at step 2 of 2: " in caplog.text and "no held-out pairs" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"match": "tokens"}, r"match=tokens needs a target: set training\.target"),
        ({"match": "delta_norm", "target": 0.0}, "greater than 0"),
        ({"match": "accuracy", "target": 1.5}, "target must be at most 1 for match=accuracy, got 1.5"),
        ({"match": "loss", "target": 1.0}, "match"),
    ],
)
def test_a_match_without_a_target_that_can_be_reached_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Training(**wrong)


def test_a_matched_accuracy_without_heldout_pairs_is_refused(tmp_path):
    without = replace(EXAMPLES, heldout_pairs=[])
    training = replace(TRAINING, match="accuracy", target=0.9)
    with pytest.raises(
        ValueError, match="match=accuracy needs held-out preference pairs, but world-style has"
    ):
        trained(tmp_path, training, DPO(), without)
