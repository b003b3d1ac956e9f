"""The ends of the graded family against the libraries' own losses in fp64, and how it trains."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file
from small import TRAINING, curves, trainer_for
from torch.testing import assert_close

from weightgeom.estimators.gradients import Gathering, gradient_moments, sampled
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.graded_contrastive import GradedContrastive
from weightgeom.training.fit import outdated_name_allowed

TOKEN = {
    "all": {},
    "uniform": {"negatives": 10, "source": "uniform"},
    "unigram": {"negatives": 10, "source": "unigram"},
    "model": {"negatives": 10, "source": "model"},
}
SEQUENCE = {
    "rejected": {},
    "in_batch": {"negatives": 4},
    "no reference": {"reference": False, "negatives": 2},
}


def token(**choices) -> GradedContrastive:
    """Of 150 tokens the target has 0.99 of q at this tau."""
    return GradedContrastive(level="token", **{"train_on": "chosen", "tau": 0.1, **choices})


ALL = {f"token {name}": token(**choices) for name, choices in TOKEN.items()} | {
    f"sequence {name}": GradedContrastive(**choices) for name, choices in SEQUENCE.items()
}


def moved(trainer):
    """The trainer in fp64, its policy away from its reference: the same for equal networks."""
    generator = torch.Generator().manual_seed(1)
    network = trainer.model.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 20
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model.double().eval()
    return trainer


@contextmanager
def in_fp64() -> Iterator[None]:
    """Within it the libraries, which compute their losses in fp32 whatever they are given, do so in fp64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def batch(trainer, rows):
    """Some of the trainer's own examples, as it would see them."""
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))


def with_gradient(trainer, compute):
    """A loss in fp64 and its gradient in all parameters."""
    with in_fp64(), outdated_name_allowed():
        loss = compute(trainer)
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    assert loss.dtype == torch.float64
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def same(measured, other, tolerance=1e-10):
    """Two losses and their whole gradients agree, relative to the norm of the gradient."""
    loss, gradient = measured
    expected, expected_gradient = other
    assert abs(float(loss / expected) - 1) < tolerance
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < tolerance
    assert float(expected_gradient.norm()) > 1e-3


@pytest.mark.parametrize("on", ["chosen", "text"])
@pytest.mark.parametrize("negatives", ["all", "all by number"])
def test_tokens_against_all_others_at_tau_0_are_transformers_own_loss(
    on, negatives, model, examples, tmp_path
):
    number = None if negatives == "all" else len(model.tokenizer) - 1
    objective = token(tau=0.0, negatives=number, train_on=on)
    trainer = moved(trainer_for(objective, model, examples, tmp_path))
    inputs = batch(trainer, range(6))
    assert on == "text" or bool((inputs["labels"] == -100).any())  # prompts are not scored

    def by_transformers(trainer):
        names = ("input_ids", "attention_mask", "labels")
        return trainer.model(**{name: inputs[name] for name in names}).loss

    ours = with_gradient(trainer, lambda trainer: trainer.compute_loss(trainer.model, dict(inputs)))
    same(ours, with_gradient(trainer, by_transformers))
    # And it is what `objective=ce` trains on.
    ce = moved(trainer_for(CE(on), model, examples, tmp_path))
    same(ours, with_gradient(ce, lambda trainer: trainer.compute_loss(trainer.model, dict(inputs))))


def test_a_response_against_the_rejected_one_at_tau_0_is_trls_dpo(model, examples, tmp_path):
    ours = moved(trainer_for(GradedContrastive(tau=0.0, beta=0.3), model, examples, tmp_path))
    theirs = moved(trainer_for(DPO(beta=0.3), model, examples, tmp_path))
    same(with_gradient(ours, loss_of(range(6))), with_gradient(theirs, loss_of(range(6))))


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_with_tau_it_is_trls_dpo_with_smoothed_labels(tau, model, examples, tmp_path):
    smoothing = 1 / (1 + math.exp(1 / tau))
    ours = moved(trainer_for(GradedContrastive(tau=tau, beta=0.3), model, examples, tmp_path))
    # TRL smooths the labels of its `aot` loss, which for a single pair is the sigmoid loss.
    aot = DPO(beta=0.3, loss_type="aot", label_smoothing=smoothing)
    theirs = moved(trainer_for(aot, model, examples, tmp_path))
    for row in range(3):
        same(with_gradient(ours, loss_of([row])), with_gradient(theirs, loss_of([row])))


def test_with_tau_it_is_trls_sigmoid_loss_of_pairs_some_of_which_are_swapped(model, examples, tmp_path):
    smoothing = 1 / (1 + math.exp(1))
    ours = moved(trainer_for(GradedContrastive(beta=0.3), model, examples, tmp_path))
    theirs = moved(trainer_for(DPO(beta=0.3), model, examples, tmp_path))

    def swapped(trainer):
        inputs = batch(trainer, range(6))
        other = {name: torch.cat(value.chunk(2)[::-1]) for name, value in inputs.items()}
        loss, flipped = (trainer.compute_loss(trainer.model, batch) for batch in (inputs, other))
        return (1 - smoothing) * loss + smoothing * flipped

    same(with_gradient(ours, loss_of(range(6))), with_gradient(theirs, swapped))


def loss_of(rows):
    return lambda trainer: trainer.compute_loss(trainer.model, batch(trainer, rows))


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("tau", [0.0, 1.0, 1e3, math.inf])
def test_only_indifference_has_no_gradient_where_policy_and_reference_are_the_same(
    tau, negatives, model, examples, tmp_path
):
    objective = GradedContrastive(tau=tau, negatives=negatives)
    trainer = trainer_for(objective, model, examples, tmp_path)
    trainer.model.double().eval()
    trainer.ref_model.double().eval()
    loss, gradient = with_gradient(trainer, loss_of(range(6)))
    assert objective.first_loss == math.log(negatives + 1)
    assert float(loss) == pytest.approx(objective.first_loss, abs=1e-12)
    assert (float(gradient.abs().max()) < 1e-12) == math.isinf(tau)


def test_responses_of_other_prompts_are_scored_behind_the_prompt(model, examples, tmp_path):
    trainer = moved(trainer_for(GradedContrastive(tau=0.0, negatives=3), model, examples, tmp_path))
    data, rows = trainer.train_dataset, [4, 2, 7, 5]
    loss, _ = with_gradient(trainer, loss_of(rows))

    def score(prompt, response):
        """beta (log pi - log pi_ref) of one response, token by token."""
        ids = torch.tensor([prompt + response])
        with in_fp64(), torch.no_grad():
            policy, reference = (
                torch.log_softmax(network(input_ids=ids).logits[0], 1)
                for network in (trainer.model, trainer.ref_model)
            )
        ratio = policy - reference
        return 0.1 * sum(float(ratio[place - 1, ids[0, place]]) for place in range(len(prompt), ids.shape[1]))

    losses = []
    for place, row in enumerate(rows):
        others = [data[rows[(place + shift) % 4]]["chosen_ids"] for shift in (1, 2)]
        responses = [data[row]["chosen_ids"], data[row]["rejected_ids"], *others]
        scores = [score(data[row]["prompt_ids"], response) for response in responses]
        losses.append(math.log(sum(map(math.exp, scores))) - scores[0])
    assert float(loss) == pytest.approx(sum(losses) / 4, rel=1e-9)


def test_a_response_that_is_the_chosen_one_once_more_is_no_negative(model, examples, tmp_path):
    twice = replace(examples, pairs=[*examples.pairs[:1], examples.pairs[0], *examples.pairs[1:]])
    trainer = trainer_for(GradedContrastive(tau=0.0, negatives=3), model, twice, tmp_path)
    # The others of a row are those of the next two; examples 0 and 1 are the same.
    grades = batch(trainer, [0, 2, 1, 3])["grades"]
    assert grades.tolist() == [[1, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]


def test_the_responses_to_a_prompt_are_told_apart_from_those_to_others(model, examples, tmp_path):
    objective = GradedContrastive(negatives=3)
    trainer = trainer_for(objective, model, examples, tmp_path)
    inputs = batch(trainer, [4, 2, 7])
    scored = objective.scored(inputs)
    assert scored.prompt == [0, 1, 2] * 4 and scored.terms == [1, 1, 1]
    for row, prompt in enumerate(scored.prompt):
        ids = trainer.train_dataset[[4, 2, 7][prompt]]["prompt_ids"]
        assert inputs["input_ids"][row, ~scored.targets[row]][: len(ids)].tolist() == ids


def test_the_unigram_frequencies_are_those_of_the_responses_plus_one(model, examples, tmp_path):
    trainer = trainer_for(token(negatives=5, source="unigram"), model, examples, tmp_path)
    counts = torch.ones(len(model.tokenizer))
    for ids, labels in zip(*(trainer.train_dataset[name] for name in ("input_ids", "labels")), strict=True):
        for token_id, label in zip(ids, labels, strict=True):
            counts[token_id] += label != -100
    assert counts.max() > 20
    assert_close(trainer.contrast.log_unigram.exp(), counts)


def test_an_epochs_last_batch_may_have_fewer_candidates(model, examples, tmp_path):
    trainer = trainer_for(GradedContrastive(negatives=4), model, examples, tmp_path)
    assert [batch(trainer, range(size))["grades"].shape for size in (1, 2, 8)] == [(1, 2), (2, 3), (8, 5)]


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
def test_every_level_and_source_trains(objective, model, examples, tmp_path):
    longer = replace(TRAINING, steps=6, learning_rate=1e-2)
    by_step = curves(objective, model, examples, tmp_path, longer)
    assert by_step[6]["loss"] < by_step[1]["loss"] - 0.01
    logged = "mean_token_accuracy" if objective.level == "token" else "rewards/margins"
    assert {"entropy", "grad_norm", "participation_ratio", "target_energy", logged} <= by_step[1].keys()


@pytest.mark.parametrize(
    ("objective", "library"),
    [(token(tau=0.0), CE("chosen")), (GradedContrastive(tau=0.0), DPO())],
    ids=["ce", "dpo"],
)
def test_at_the_ends_a_training_and_all_it_logs_are_the_librarys(
    objective, library, model, examples, tmp_path
):
    training = replace(TRAINING, steps=3, accumulate=2)
    ours, theirs = (
        curves(contrast, model, examples, tmp_path / str(name), training)
        for name, contrast in enumerate((objective, library))
    )
    # Ours are of the step's batches, those of the library's losses of the first examples after the step.
    names = theirs[1].keys() - {"participation_ratio", "target_energy", "alternatives"}
    assert len(names) > 3
    for step in (1, 2, 3):
        assert {name: ours[step][name] for name in names} == pytest.approx(
            {name: theirs[step][name] for name in names}, rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
def test_the_sharpness_is_logged_by_trl_at_the_steps_that_it_logs(objective, model, examples, tmp_path):
    training = replace(TRAINING, steps=4, log_every=2)
    trainer = trainer_for(objective, model, examples, tmp_path, training)
    with outdated_name_allowed():
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 4]
    size = objective.negatives + 1 if objective.level == "token" and objective.negatives else 150
    for log in logs:
        assert 1 <= log["participation_ratio"] <= size
        assert 0 <= log["target_energy"] <= 1


def test_the_logged_sharpness_is_that_of_the_gradient_that_comes_back_to_the_logits(
    model, examples, tmp_path
):
    for objective in (token(tau=0.5), token(tau=0.5, negatives=7), GradedContrastive(tau=0.5)):
        trainer = moved(trainer_for(objective, model, examples, tmp_path))
        trainer.model.train()
        seen = []

        def keep(module, inputs, output, seen=seen):
            if output.requires_grad:
                output.register_hook(seen.append)

        trainer.model.get_output_embeddings().register_forward_hook(keep)
        inputs = batch(trainer, [0])
        if objective.level == "token":
            with_gradient(trainer, lambda trainer, inputs=inputs: trainer.compute_loss(trainer.model, inputs))
            (gradient,), mask = seen, inputs["labels"][:, 1:] != -100
            targets = inputs["labels"][:, 1:][mask]
        else:  # the fused head has no logits: take log-probabilities from an ordinary pass instead
            mask, targets = inputs["completion_mask"][:, 1:].bool(), inputs["input_ids"][:, 1:]
            with in_fp64(), outdated_name_allowed():
                trainer.compute_loss(trainer.model, dict(inputs))
                given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                picked = trainer.model(**given).logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])
                scores = (picked[..., 0] * mask).sum(1)
                (scores[0] - scores[1]).backward()  # up to a factor, which sharpness does not have
            (gradient,), targets = seen, targets[mask]
        g = gradient[:, :-1][mask]
        energy = g.square()
        ratio = (energy.sum(1) ** 2 / energy.square().sum(1)).mean()
        share = (energy[torch.arange(len(g)), targets] / energy.sum(1)).mean()
        logged = trainer._metrics["train"]
        assert logged["participation_ratio"] == pytest.approx([float(ratio)], rel=1e-5)
        assert logged["target_energy"] == pytest.approx([float(share)], rel=1e-5)


def test_a_higher_tau_is_less_sharp(model, examples, tmp_path):
    ratios = []
    for tau in (0.0, 0.2, 0.3, math.inf):
        by_step = trainer_for(token(tau=tau), model, examples, tmp_path, replace(TRAINING, steps=1))
        with outdated_name_allowed():
            by_step.train()
        ratios.append(by_step.state.log_history[0]["participation_ratio"])
    assert ratios == sorted(ratios) and ratios[0] < 1.1 and ratios[-1] > 2


class Interrupting(small.Curves):
    def __call__(self, metrics, step):
        super().__call__(metrics, step)
        if step == 3:
            raise InterruptedError


@pytest.mark.parametrize("source", ["uniform", "unigram", "in_batch"])
def test_a_resumed_training_draws_the_same_negatives(source, model, examples, tmp_path):
    objective = GradedContrastive(negatives=4) if source == "in_batch" else token(negatives=5, source=source)
    training = replace(TRAINING, steps=4, batch_size=4, accumulate=2, save_every=2)
    whole = curves(objective, model, examples, tmp_path / "whole", training)
    with pytest.raises(InterruptedError):
        curves(objective, model, examples, tmp_path / "cut", training, Interrupting())
    resumed = curves(objective, model, examples, tmp_path / "cut", training)
    assert list(resumed) == [3, 4]
    assert resumed[3] == whole[3] and resumed[4] == whole[4]
    uninterrupted, other = (
        load_file(tmp_path / name / "step-4/model.safetensors") for name in ("whole", "cut")
    )
    assert_close(uninterrupted, other, rtol=0, atol=0)


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
def test_moments_are_gathered_under_it(objective, model, examples):
    params = {name: weight.clone() for name, weight in model.network.named_parameters()}

    def gathered(**options):
        gathering = Gathering(**{"prompts": 6, "batch_size": 6, **options})
        return list(gradient_moments(model, params, objective, TRAINING, examples, gathering, seed=5))

    (gathered_pass,) = gathered()
    split = gathered(budget_gb=1e-9)
    assert gathered_pass.prompts == 6 and len(split) == 2
    gradients = {name: gradient for part in split for name, gradient in part.gradients.items()}
    for name, gradient in gathered_pass.gradients.items():
        assert float(gradient.value.abs().max()) > 0
        assert_close(gradient.value, gradients[name].value, rtol=0, atol=0)  # the draws too


@pytest.mark.parametrize("objective", [token(), GradedContrastive(negatives=3)], ids=["token", "sequence"])
def test_the_gathered_gradient_is_that_of_the_trainers_mean_loss(objective, model, examples, tmp_path):
    params = {name: weight.clone() for name, weight in model.network.named_parameters()}
    gathering = Gathering(prompts=8, batch_size=8)
    (gathered_pass,) = gradient_moments(model, params, objective, TRAINING, examples, gathering, seed=0)
    network = model.with_weights(params).requires_grad_(False).eval()
    kept = sampled(examples, 8, TRAINING.max_length, 0)
    arguments = TRAINING.arguments(tmp_path, 0, "cpu") | {"per_device_eval_batch_size": 8}
    trainer = objective.trainer(network, model.tokenizer, kept, arguments)
    (inputs,) = trainer.get_eval_dataloader(trainer.train_dataset.shuffle(seed=0).select(range(8)))
    network.requires_grad_(True)
    scored = objective.scored(inputs)
    assert len(scored.prompt) == len(inputs["input_ids"]) and len(scored.terms) == 8
    with outdated_name_allowed():
        trainer.compute_loss(network, inputs).backward()
    for name, gradient in gathered_pass.gradients.items():
        expected = network.get_parameter(name).grad
        assert_close(gradient.value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": -0.1}, r"tau must be a number of at least 0, or inf, got -0\.1"),
        ({"tau": math.nan}, "tau must be a number of at least 0, or inf, got nan"),
        ({"tau": -math.inf}, "tau must be a number of at least 0, or inf, got -inf"),
        ({"tau": "sharp"}, "tau must be a number of at least 0, or inf, got sharp"),
        ({"beta": 0.0}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"negatives": 0}, "negatives"),
        ({"level": "token", "reference": True}, "reference=true has no meaning at level=token"),
        (
            {"level": "token", "source": "in_batch"},
            "source=in_batch has no meaning at level=token: choose from uni",
        ),
        (
            {"source": "model"},
            "source=model has no meaning at level=sequence: choose from rejected, in_batch",
        ),
        ({"train_on": "text"}, "train_on=text has no meaning at level=sequence"),
        ({"source": "rejected", "negatives": 2}, "source=rejected gives 1 negative, but negatives=2: set"),
        ({"source": "in_batch"}, "source=in_batch needs negatives of at least 2"),
    ],
)
def test_what_does_not_go_together_is_refused_when_it_is_described(wrong, message):
    with pytest.raises(ValueError, match=message):
        GradedContrastive(**wrong)


def test_an_infinite_tau_is_one_that_a_signature_can_hold():
    for tau in (math.inf, "inf"):
        assert json.loads(json.dumps(asdict(GradedContrastive(tau=tau)), allow_nan=False))["tau"] == "inf"


def test_data_without_what_is_contrasted_are_refused(examples):
    no_pairs, no_text = replace(examples, pairs=[]), replace(examples, text=[])
    with pytest.raises(ValueError, match="on chosen needs preference pairs, but world-style has none"):
        token().check(no_pairs)
    with pytest.raises(ValueError, match="on text needs text, but world-style has none"):
        token(train_on="text").check(no_text)
    token(train_on="auto").check(no_text)
    with pytest.raises(ValueError, match="level=sequence needs preference pairs, but world-style has none"):
        GradedContrastive().check(no_pairs)
    unpaired = replace(examples.pairs[0], rejected="")
    with pytest.raises(ValueError, match="needs a rejected response for every prompt, but 1 of 3 in world"):
        GradedContrastive().check(replace(examples, pairs=[*examples.pairs[:2], unpaired]))
    with pytest.raises(
        ValueError, match="negatives must be at most 3, the number of pairs in world-style, got 4"
    ):
        GradedContrastive(negatives=4).check(replace(examples, pairs=examples.pairs[:3]))
    GradedContrastive(negatives=3).check(replace(examples, pairs=examples.pairs[:3]))


def test_more_negatives_than_the_vocabulary_or_a_batch_has_are_refused_before_training(
    model, examples, tmp_path
):
    size = len(model.tokenizer)
    message = f"negatives must be at most {size - 1}, the vocabulary without the target, got {size}"
    with pytest.raises(ValueError, match=message):
        trainer_for(token(negatives=size), model, examples, tmp_path)
    with pytest.raises(ValueError, match=r"negatives must be at most 8, the batch size, got 9"):
        trainer_for(GradedContrastive(negatives=9), model, examples, tmp_path)


@pytest.mark.parametrize("objective", [token(), GradedContrastive()], ids=["token", "sequence"])
def test_the_log_says_what_was_cut_and_too_long_prompts_are_refused(
    objective, model, examples, tmp_path: Path, caplog
):
    short = replace(TRAINING, max_length=16)
    with caplog.at_level(logging.INFO):
        trainer_for(objective, model, examples, tmp_path, short)
    assert f"{len(examples.pairs)} " in caplog.text and "truncated to 16 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"every prompt is 3 tokens or longer: raise training\.max_length"):
        trainer_for(objective, model, examples, tmp_path, replace(TRAINING, max_length=3))
