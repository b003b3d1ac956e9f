"""Training of adapters: what is left on disk, and that the rest of the house takes it for any training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import small
import torch
from app import BEHAVIOUR, SMALL, WORLD, run, status
from safetensors.torch import load_file
from torch.testing import assert_close

from weightgeom.estimators.updates import update_of
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import open_checkpoint
from weightgeom.models.loading import load
from weightgeom.objectives.ce import CE
from weightgeom.objectives.dpo import DPO
from weightgeom.objectives.graded_contrastive import GradedContrastive
from weightgeom.objectives.kto import KTO
from weightgeom.probes.rsf import RSF
from weightgeom.training.config import Training
from weightgeom.training.fit import fit
from weightgeom.training.lora import Lora, current_weights
from weightgeom.training.resuming import resume_states
from weightgeom.trajectory import Trajectory

TRAINING = Training(
    steps=5, batch_size=4, learning_rate=1e-2, max_length=48, log_every=1, lora=Lora(r=3, alpha=6)
)
OBJECTIVES = {
    "text": CE("text"),
    "chosen": CE("chosen"),
    "dpo": DPO(),
    "kto": KTO(),
    "graded tokens": GradedContrastive(level="token", negatives=7, tau=0.1, source="unigram"),
    "graded sequences": GradedContrastive(negatives=2),
    "without reference": GradedContrastive(reference=False),
}
EXAMPLES = small.WORLD.examples()
TOKENIZER = small.WORLD.tokenizer()


def train(directory: Path, objective, training=TRAINING, network=None, curves=None, seed=0) -> Trajectory:
    network = network or small.network(TOKENIZER)
    start = directory.parent / "start"
    if not start.exists():
        network.save_pretrained(start)
        TOKENIZER.save_pretrained(start)
    torch.manual_seed(hash(str(directory)) % 1000)  # what was drawn before must not matter
    return fit(
        objective,
        network,
        TOKENIZER,
        EXAMPLES,
        training,
        directory,
        name="an adapter",
        seed=seed,
        device="cpu",
        log_metrics=curves or small.Curves(),
        start=start,
    )


def opened(trained: Trajectory):
    """The map, the base and the last checkpoint of a trajectory."""
    model = load(trained.steps[0], "cpu")
    base = model.params(trained.steps[0])
    return model, base, model.params(trained.steps[trained.last], base)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_trains_an_adapter_of_that_rank_from_its_known_first_loss(objective, tmp_path):
    curves = small.Curves()
    trained = train(tmp_path / "training", objective, curves=curves)
    assert list(trained.steps) == [0, 1, 2, 4, 5] and trained.steps[0] == tmp_path / "start"
    assert objective.first_loss is None or curves.by_step[1]["loss"] == pytest.approx(objective.first_loss)
    for step in (1, 2, 4, 5):
        assert (trained.steps[step] / "adapter_model.safetensors").is_file()
        assert not list(trained.steps[step].glob("model*.safetensors"))
    model, base, end = opened(trained)
    adapted = {matrix.parameter for matrix in model.architecture.matrices}
    for name in base:
        delta = (end[name] - base[name]).double()
        assert (torch.linalg.matrix_rank(delta, rtol=1e-5) == 3) if name in adapted else not delta.any()


def test_the_base_is_frozen_and_the_current_weights_are_those_on_disk(tmp_path):
    for name in ("gpt_neox", "gpt2", "llama_tied", "olmo2"):
        model, before = networks.language_model(name, TOKENIZER)
        trained = train(tmp_path / name / "training", CE("chosen"), network=model.network)
        current = current_weights(model.network, model.architecture)
        saved = open_checkpoint(trained.steps[5], model.architecture, model.params(tmp_path / name / "start"))
        assert set(current) == set(before)
        for key, weight in before.items():
            frozen = dict(current.base)[key]  # pyright: ignore[reportAttributeAccessIssue]
            assert torch.equal(frozen, weight), key
            assert_close(current[key], saved[key], rtol=0, atol=0)
        # PEFT's own forward pass of the network is one with these weights.
        ids = torch.arange(20)[None]
        ours = torch.func.functional_call(model.with_weights({}), dict(current), kwargs={"input_ids": ids})
        assert_close(model.network.eval()(input_ids=ids).logits, ours.logits, rtol=1e-4, atol=1e-4)


def test_rsf_from_the_factors_is_that_of_the_multiplied_out_weights(tmp_path):
    model, base, end = opened(train(tmp_path / "training", DPO()))
    tables = []
    for after in (end, dict(end)):
        setting = Setting(model, base, after, False, EXAMPLES, seed=3, objective=DPO(), training=TRAINING)
        rows = RSF(tokens=256, prompts=8, resamples=4).measurement(setting)(after)
        keys = ("layer", "matrix", "arm", "subspace", "quantity")
        tables.append({tuple(row.get(key) for key in keys): row["value"] for row in rows})
    factors, dense = tables
    of_adapters = {key for key in factors if key[-1].startswith("adapter_")}
    assert {key[-1] for key in of_adapters} == {
        "adapter_rank",
        "adapter_ratio",
        "adapter_z",
        "adapter_p_value",
    }
    assert factors.keys() - of_adapters == dense.keys() and any(key[-1] == "ratio" for key in dense)
    for key, value in factors.items():
        if key[-1] in ("fraction", "ratio", "delta_norm"):
            assert value == pytest.approx(dense[key], rel=1e-5, abs=1e-6), key


def test_the_norm_that_matching_reports_is_that_of_the_checkpoint(tmp_path):
    training = replace(TRAINING, steps=40, match="delta_norm", target=0.5)
    trained = train(tmp_path / "training", CE("chosen"), training)
    model, base, end = opened(trained)
    parameters = {matrix.parameter for matrix in model.architecture.matrices}
    norm = math.sqrt(sum(float((end[name] - base[name]).square().sum()) for name in parameters))
    report = json.loads((tmp_path / "training/matching.json").read_text())
    assert report["reached"] and 1 < report["steps"] < 40 and trained.last == report["steps"]
    assert report["delta_norm"] == pytest.approx(norm, rel=1e-5)


def test_only_the_targets_are_adapted(tmp_path):
    lora = Lora(r=2, targets=["dense", "dense_4h_to_h"])
    model, base, end = opened(train(tmp_path / "training", CE("chosen"), replace(TRAINING, lora=lora)))
    moved = {m.kind for m in model.architecture.matrices if update_of(m, end, base).norm > 0}
    assert moved == {"o", "down"}
    with pytest.raises(
        ValueError, match=r"unknown module 'denes' in training\.lora\.targets; choose from dense, dense_4h_"
    ):
        Lora(r=2, targets=["denes"]).check(model.architecture)


class Interrupting(small.Curves):
    def __call__(self, metrics, step):
        super().__call__(metrics, step)
        if step == 3:
            raise InterruptedError


@pytest.mark.parametrize("name", ["chosen", "dpo", "kto", "graded sequences"])
def test_the_same_seed_gives_the_same_bits_also_where_a_training_was_interrupted(name, tmp_path):
    lora = replace(TRAINING.lora, dropout=0.1 if name == "chosen" else 0.0)
    training = replace(TRAINING, save_every=2, lora=lora)
    train(tmp_path / "whole", OBJECTIVES[name], training)
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", OBJECTIVES[name], training, curves=Interrupting())
    assert resume_states(tmp_path / "cut")
    curves = small.Curves()
    train(tmp_path / "cut", OBJECTIVES[name], training, curves=curves)
    assert min(curves.by_step) == 3
    for step in (1, 2, 4, 5):
        whole, cut = (
            load_file(tmp_path / place / f"step-{step}/adapter_model.safetensors")
            for place in ("whole", "cut")
        )
        assert_close(whole, cut, rtol=0, atol=0)
    train(tmp_path / "other", OBJECTIVES[name], training, seed=1)
    other = load_file(tmp_path / "other/step-5/adapter_model.safetensors")
    assert not all(torch.equal(whole[key], other[key]) for key in whole)


def test_a_dropout_that_trl_would_switch_off_is_refused(tmp_path):
    training = replace(TRAINING, steps=2, lora=Lora(r=2, dropout=0.1))
    with pytest.raises(
        ValueError, match=r"training\.lora\.dropout is 0\.1, but TRL .* without dropout: set training"
    ):
        train(tmp_path / "off", DPO(), training)
    kept = DPO(options={"disable_dropout": False})
    assert train(tmp_path / "on", kept, training).last == 2


def test_a_random_start_and_norms_of_gradients_that_are_not_taken_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"lora\.r trains an adapter of a base, but this training has a random start"
    ):
        fit(
            CE("text"),
            small.network(TOKENIZER),
            TOKENIZER,
            EXAMPLES,
            TRAINING,
            tmp_path,
            name="",
            seed=0,
            device="cpu",
            log_metrics=small.Curves(),
        )
    with pytest.raises(ValueError, match=r"log_gradients needs the gradients of whole matrices"):
        Training(lora=Lora(r=1), log_gradients=True)


def test_a_run_trains_an_adapter_and_probes_all_its_checkpoints(tmp_path):
    probes = "probe=[rsf,behaviour,moments]", "probe.moments.prompts=8"
    ended = run(tmp_path, *SMALL, *WORLD, *probes, "objective=dpo", "training.lora.r=4")
    assert ended.code == 0, ended.err
    assert status(ended.record)["status"] == "FINISHED"
    (training,) = (path.parent for path in (tmp_path / "outputs/training").glob("*/DONE"))
    assert {path.parent.name for path in training.glob("step-*/adapter_config.json")} == {"step-1", "step-2"}
    wrong = run(tmp_path, *BEHAVIOUR, *WORLD, "objective=dpo", "training.lora={r:4,targets:[q_proj]}")
    assert wrong.code == 1 and "unknown module 'q_proj' in training.lora.targets" in wrong.err
