import inspect
import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from small import TRAINING, curves
from trl import DPOTrainer

from weightgeom.objectives.dpo import DPO, LOSS_TYPES
from weightgeom.text.tokens import responses


def test_the_first_loss_is_ln_2_and_the_second_is_lower(tmp_path, model, examples):
    by_step = curves(DPO(), model, examples, tmp_path)
    assert DPO().first_loss == math.log(2)
    assert by_step[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert by_step[2]["loss"] < by_step[1]["loss"]


def test_trl_scores_the_pairs_as_we_do(tmp_path, model, examples):
    everything = replace(TRAINING, steps=1, batch_size=len(examples.pairs))
    by_step = curves(DPO(), model, examples, tmp_path, everything)
    params = dict(model.network.named_parameters())
    scored = list(responses(examples.pairs, model.tokenizer, 48))
    chosen = torch.cat([model.log_probs(params, batch).sum(1) for batch, _ in scored]).mean()
    rejected = torch.cat([model.log_probs(params, batch).sum(1) for _, batch in scored]).mean()
    assert by_step[1]["logps/chosen"] == pytest.approx(float(chosen), rel=1e-5)
    assert by_step[1]["logps/rejected"] == pytest.approx(float(rejected), rel=1e-5)


def test_a_reference_computed_first_gives_the_same_losses_without_a_second_network(tmp_path, model, examples):
    made = []

    class Watched(DPO):
        def trainer(self, network, tokenizer, examples, arguments):
            made.append(super().trainer(network, tokenizer, examples, arguments))
            return made[-1]

    usual = curves(DPO(), model, examples, tmp_path / "usual")
    first = curves(Watched(precompute_reference=True), model, examples, tmp_path / "first")
    assert made[0].ref_model is None
    for step, metrics in usual.items():
        assert first[step]["loss"] == pytest.approx(metrics["loss"], abs=1e-6)


def test_all_loss_types_of_trl_are_known():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains(loss_type, tmp_path, model, examples):
    smoothing = 1e-3 if loss_type == "exo_pair" else 0.0
    by_step = curves(DPO(loss_type=loss_type, label_smoothing=smoothing), model, examples, tmp_path)
    assert math.isfinite(by_step[2]["loss"])


def test_loss_types_combine_with_weights_and_options_reach_trl(tmp_path, model, examples):
    both = DPO(loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.0])
    assert both.first_loss is None
    by_step = curves(both, model, examples, tmp_path)
    assert by_step[1]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
    option = DPO(options={"f_divergence_type": "forward_kl"})
    option.check(examples)
    assert curves(option, model, examples, tmp_path / "option")[1]["loss"] == pytest.approx(
        math.log(2), abs=1e-5
    )


def test_the_log_says_how_many_pairs_were_dropped_and_cut(tmp_path, model, examples, caplog):
    with caplog.at_level(logging.INFO):
        curves(DPO(), model, examples, tmp_path, replace(TRAINING, max_length=16))
    counts = re.search(
        r"(\d+) pairs: (\d+) dropped \(prompt of 16 tokens or more\), (\d+) truncated to 16 tokens",
        caplog.text,
    )
    assert counts is not None
    pairs, dropped, cut = map(int, counts.groups())
    assert (pairs, dropped) == (len(examples.pairs), 0) and 0 < cut <= pairs
    with pytest.raises(ValueError, match=r"every prompt is 3 tokens or longer: raise training\.max_length"):
        curves(DPO(), model, examples, tmp_path, replace(TRAINING, max_length=3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"loss_type": "sigmoidal"}, "unknown loss_type 'sigmoidal'; choose from sigmoid, hinge"),
        (
            {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]},
            "loss_weights has 1 entries for 2 loss types",
        ),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ({"label_smoothing": 0.1}, "loss_type sigmoid ignores label_smoothing: choose from aot"),
        (
            {"precompute_reference": True, "options": {"sync_ref_model": True}},
            "sync_ref_model moves the reference",
        ),
    ],
)
def test_what_trl_would_refuse_late_is_refused_when_the_objective_is_described(wrong, message):
    with pytest.raises(ValueError, match=message):
        DPO(**wrong)


def test_data_without_pairs_and_options_that_trl_does_not_have_are_refused(examples):
    with pytest.raises(ValueError, match="objective=dpo needs preference pairs, but world-style has none"):
        DPO().check(replace(examples, pairs=[]))
    with pytest.raises(
        ValueError, match=r"TRL's DPOConfig has no option 'ld_alfa'; the nearest are ld_alpha"
    ):
        DPO(options={"ld_alfa": 0.5}).check(examples)
    with pytest.raises(ValueError, match=r"objective\.options cannot set 'beta'"):
        DPO(options={"beta": 0.5}).check(examples)
