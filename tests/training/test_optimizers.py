"""Optimizers against their published rules, and trainings by them."""

from copy import deepcopy
from dataclasses import replace
from math import sqrt

import pytest
import small
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from weightgeom.geometry.subspace import Subspace
from weightgeom.objectives.ce import CE
from weightgeom.training.config import Training
from weightgeom.training.lora import Lora
from weightgeom.training.optimizers import OPTIMIZERS, Lion, MuonAndAdamW, set_optimizer


def test_lion_takes_the_sign_of_its_momentum_and_decays_the_weights():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([{"params": [weight], "weight_decay": 0.5}], lr=0.1)
    for gradient, value, momentum in (
        # sign(0.1 · 0.5) = 1: 1 · (1 - 0.1 · 0.5) - 0.1 = 0.85; m = 0.01 · 0.5
        (0.5, 0.85, 0.005),
        # sign(0.9 · 0.005 - 0.1 · 0.02) = sign(0.0025) = 1, against the gradient: 0.85 · 0.95 - 0.1
        (-0.02, 0.7075, 0.00475),
        # sign(0.9 · 0.00475 - 0.1 · 0.05) = sign(-0.000725) = -1: 0.7075 · 0.95 + 0.1
        (-0.05, 0.772125, 0.0042025),
    ):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        assert_close(weight.data, torch.tensor([value]))
        assert_close(optimizer.state[weight]["momentum"], torch.tensor([momentum]))


def parameters(generator):
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((8, 6), (5, 6), (6,))]


def stepped(weights, optimizers, gradients):
    for of_step in gradients:
        for weight, gradient in zip(weights, of_step, strict=True):
            weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


def test_muon_and_adamw_are_those_of_torch_on_their_parts_and_resume_from_their_state(generator):
    ours = parameters(generator)
    theirs, later = ([nn.Parameter(weight.detach().clone()) for weight in ours] for _ in "ab")
    gradients = [[torch.randn(weight.shape, generator=generator) for weight in ours] for _ in range(5)]

    def both(weights):
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
        return MuonAndAdamW(groups, lr=0.01, matrices=[weights[0]])

    whole, other = both(ours), both(later)
    separate = (
        torch.optim.Muon([theirs[0]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs[1]], lr=0.01, weight_decay=0.1, fused=True),
        torch.optim.AdamW([theirs[2]], lr=0.01, weight_decay=0.0, fused=True),
    )
    stepped(ours, [whole], gradients[:3])
    for weight, copy in zip(later, ours, strict=True):
        weight.data.copy_(copy)
    other.load_state_dict(deepcopy(whole.state_dict()))  # torch would share the tensors
    stepped(ours, [whole], gradients[3:])
    stepped(later, [other], gradients[3:])
    stepped(theirs, separate, gradients)
    for weights in zip(ours, theirs, later, strict=True):
        assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_a_schedule_reaches_both_parts(generator):
    weights = parameters(generator)
    optimizer = MuonAndAdamW([{"params": weights, "weight_decay": 0.0}], lr=1.0, matrices=weights[:1])
    before = [weight.detach().clone() for weight in weights]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    stepped(weights, [optimizer], [[torch.ones_like(weight) for weight in weights]])
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))


def test_an_orthogonalised_update_of_full_rank_has_ratio_one_in_every_subspace(generator):
    # A gradient whose rows are almost all along the first of 16 directions.
    gradient = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    gradient[:, 0] *= 20
    space = Subspace(torch.eye(16, dtype=torch.float64)[:, :2])
    assert space.relative_fraction(gradient) > 7  # of 8
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    for subspace in (space, Subspace.random(16, 2, generator)):
        assert_close(subspace.relative_fraction(left @ right), 1.0, rtol=1e-12, atol=0)
    # Newton and Schulz's five steps in bfloat16 leave singular values of 0.68 to 1.13, says their author: the
    # ratio is then within (1.13 / 0.68)² = 2.8, and in fact nearer.
    weight = nn.Parameter(torch.zeros(40, 16))
    optimizer = MuonAndAdamW([{"params": [weight], "weight_decay": 0.0}], lr=1.0, matrices=[weight])
    stepped([weight], [optimizer], [[gradient.float()]])
    assert 0.5 < space.relative_fraction(weight.detach().double()) < 2
    # Its root mean square is AdamW's, 0.2 by convention: √(16 / (40 · 16)) · 0.2 · √40 = 0.2.
    assert_close(float(weight.detach().norm()) / sqrt(640), 0.2, rtol=0.25, atol=0)


def test_muon_has_the_matrices_at_the_residual_stream_and_adamw_all_else(model, examples, tmp_path):
    trainer = small.trainer_for(CE("text"), model, examples, tmp_path)
    set_optimizer(trainer, "muon", 1e-3, model.architecture)
    optimizer = trainer.create_optimizer()
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    by: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for group in optimizer.param_groups:
        by[group["by"]] |= {names[id(weight)] for weight in group["params"]}
    assert by["muon"] == {matrix.parameter for matrix in model.architecture.matrices}
    assert by["muon"] | by["adamw"] == set(names.values()) and not by["muon"] & by["adamw"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_first_step_of_a_training_is_its_optimizers(optimizer, model, examples, tmp_path):
    asked = Training(
        steps=1, batch_size=4, learning_rate=0.01, max_length=32, max_grad_norm=0.1, optimizer=optimizer
    )
    small.curves(CE("text"), model, examples, tmp_path, asked)
    before, after = (load_file(tmp_path / f"step-{step}/model.safetensors") for step in (0, 1))
    change = {name: weight - before[name] for name, weight in after.items()}
    q = change["gpt_neox.layers.0.attention.query_key_value.weight"]
    up = change["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    norm = float(torch.stack([weight.norm() for weight in change.values()]).norm())
    if optimizer == "sgd":  # the gradient, clipped to a norm of 0.1
        assert_close(norm, 0.001, rtol=1e-3, atol=0)
    elif optimizer == "muon":  # 0.2 √64 · 0.01 times singular values of about 1
        values = torch.linalg.svdvals(up) / (0.01 * 0.2 * 8)
        # But for the last: what a fresh LayerNorm gives sums to zero, so that a direction has no gradient.
        assert 0.3 < values[-2] and values[0] < 1.4
    else:  # the rate times the sign; of Adam, less where gradients are as small as its epsilon
        assert_close(q.abs().median(), torch.tensor(0.01), rtol=0.02, atol=0)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(
        ValueError, match="optimizer=muon orthogonalises the updates of whole matrices, which"
    ):
        Training(optimizer="muon", lora=Lora(r=2))
    with pytest.raises(ValueError, match="Input should be 'adamw', 'sgd', 'muon' or 'lion'"):
        Training(optimizer="adam")  # pyright: ignore[reportArgumentType]


def test_a_state_holds_as_many_moments_as_the_optimizer_keeps():
    asked = Training(steps=8, save_every=8)
    sizes = {
        name: replace(asked, optimizer=name).checkpoints_size(10.0, 10.0, False)[1] for name in OPTIMIZERS
    }
    assert sizes == {"adamw": 30, "sgd": 10, "muon": 30, "lion": 20}
