from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import save
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from weightgeom.data.world import World
from weightgeom.estimators.moments import activation_moments
from weightgeom.figures.base import COLOURS
from weightgeom.interfaces import Setting
from weightgeom.interventions.rank1 import Rank1
from weightgeom.models.experts import stacked, unstacked
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.loading import load
from weightgeom.models.residual import ResidualMatrix, chosen
from weightgeom.objectives.ce import CE
from weightgeom.params import Params
from weightgeom.probes.moments import Moments
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum
from weightgeom.text.tokens import Batch, packed
from weightgeom.training.config import Training

WORLD = World(entities=20, heldout_entities=4, values=5, documents=40, pairs=24, heldout=6)
EXAMPLES = WORLD.examples()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def model(directory: Path) -> LanguageModel:
    return load(directory, "cpu")


@pytest.fixture(scope="module")
def params(model: LanguageModel, directory: Path) -> Params:
    return model.params(directory)


@pytest.fixture(scope="module")
def batch(model: LanguageModel) -> Batch:
    return packed(EXAMPLES.heldout, model.tokenizer, 24, 96)[0]


def matrix_of(model: LanguageModel, name: str) -> ResidualMatrix:
    return next(matrix for matrix in model.architecture.matrices if matrix.name == name)


def inside(model: LanguageModel, params: Params, batch: Batch, module: str) -> list[tuple]:
    """The input and the output of a module in a forward pass."""
    flows = []
    hook = model.network.get_submodule(module).register_forward_hook(
        lambda module, given, output: flows.append((given, output))
    )
    model.logits(model.hold(params), batch)
    hook.remove()
    return flows


def test_every_expert_is_a_matrix_and_the_router_a_kind_of_its_own(model, params):
    labels = [matrix.label for matrix in model.architecture.matrices if matrix.layer == 0]
    experts = [f"{kind}.{expert}" for expert in range(3) for kind in ("gate", "up", "down")]
    assert labels == ["q", "k", "v", "o", "router", *experts]
    dense = [matrix.label for matrix in model.architecture.matrices if matrix.layer == 1]
    assert dense == ["q", "k", "v", "gate", "up", "o", "down"]
    shapes = {
        name: tuple(matrix_of(model, name).of(params).shape) for name in ("L0.router", "L0.up.2", "L0.down.2")
    }
    assert shapes == {"L0.router": (3, 32), "L0.up.2": (12, 32), "L0.down.2": (32, 12)}
    roles = [matrix_of(model, name).role for name in ("L0.router", "L0.gate.0", "L0.down.0")]
    assert roles == ["read", "read", "write"]


def test_the_network_computes_with_the_stacks_of_what_lies_apart_on_disk(model, params, directory, batch):
    network = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = network(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert_close(model.logits(model.hold(params), batch), expected, rtol=1e-5, atol=1e-5)
    assert_close(model.streaming(params).logits({}, batch), expected, rtol=1e-5, atol=1e-5)


def test_what_is_unstacked_is_what_lay_apart(model, params):
    network = dict(stacked(params, model.architecture.stacks))
    assert "model.layers.0.mlp.experts.gate_up_proj" in network
    apart = unstacked(network, model.architecture.stacks)
    assert_close(apart, dict(params), rtol=0, atol=0)


def test_the_block_is_its_map_by_hand(model, params, batch):
    # router, softmax, the best two of three; silu(gate) up, down, weighted: from the map's matrices alone
    ((given, output),) = inside(model, params, batch, "model.layers.0.mlp")
    site = next(site for site in model.architecture.sites if site.name == "mlp_input" and site.layer == 0)
    assert site.module == "model.layers.0.mlp"
    a = given[0].flatten(0, 1)
    scores = (a @ matrix_of(model, "L0.router").of(params).T).softmax(-1)
    best, chosen = scores.topk(2, -1)
    expected = torch.zeros_like(a)
    for expert in range(3):
        gate, up, down = (
            matrix_of(model, f"L0.{kind}.{expert}").of(params) for kind in ("gate", "up", "down")
        )
        written = (torch.nn.functional.silu(a @ gate.T) * (a @ up.T)) @ down.T
        expected += (best * (chosen == expert)).sum(-1, keepdim=True) * written
    assert_close(output.flatten(0, 1), expected, rtol=1e-4, atol=1e-6)


def test_what_the_experts_read_is_the_input_of_their_block(model, params, batch):
    ((given, _),) = inside(model, params, batch, "model.layers.0.mlp")
    moments = dict(activation_moments(model, params, [batch], model.architecture.sites))
    (moment,) = [moment for site, moment in moments.items() if (site.name, site.layer) == ("mlp_input", 0)]
    a = given[0][batch.attention_mask.bool()]
    assert_close(moment.value, a.T @ a / len(a), rtol=1e-4, atol=1e-6)


def places(rows):
    """Kinds of matrix and experts."""
    return {(row["matrix"], row.get("expert")) for row in rows}


def test_an_update_of_one_expert_is_the_update_of_that_expert_alone(model, params):
    name = matrix_of(model, "L0.up.1").parameter
    after = {**params, name: params[name] + 0.1}
    setting = Setting(model, params, after, False, EXAMPLES, 0)
    rows = RSF(resamples=0, tokens=256).measurement(setting)(after)
    rows = [row for row in rows if "parameter" not in row]
    moved = places(row for row in rows if row["quantity"] == "delta_norm" and row["value"] > 0)
    assert moved == places(row for row in rows if row["quantity"] == "ratio") == {("up", 1)}


@pytest.mark.slow
def test_the_other_probes_leave_out_what_needs_gradients_and_say_so(model, params, caplog):
    after = {name: params[name] + 0.01 * torch.randn_like(params[name]) for name in params}
    setting = Setting(model, params, after, False, EXAMPLES, 0)
    under = replace(setting, objective=CE(), training=Training(max_length=32))
    every = {(matrix.kind, matrix.expert) for matrix in model.architecture.matrices}
    for probe in (Spectrum(), Overlap(), Moments(prompts=8, tokens=128)):
        probe.check(model.architecture)
        rows = probe.measurement(under)(after)
        assert places(row for row in rows if row.get("matrix")) <= every
    rows = RSF(resamples=0, tokens=256, prompts=8).measurement(under)(after)
    with_level = places(row for row in rows if row["quantity"] == "matched_ratio")
    assert every - with_level == {("o", None), ("down", None), ("down", 0), ("down", 1), ("down", 2)}
    assert "gradients under an objective are not taken of a mixture of experts" in caplog.text


def test_the_router_has_a_colour_in_the_figures(model):
    assert {matrix.kind for matrix in model.architecture.matrices} <= set(COLOURS)


def test_experts_are_not_edited_and_the_other_matrices_are(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"L0\.up\.0 is part of a mixture of experts, which cannot be"):
        chosen(model.architecture, ["k", "up"], None)
    # Layer 1 is dense.
    assert [matrix.name for matrix in chosen(model.architecture, ["k", "up"], [1])] == ["L1.k", "L1.up"]
    assert [matrix.name for matrix in chosen(model.architecture, ["k"], None)] == ["L0.k", "L1.k"]


@pytest.mark.slow
def test_attention_in_a_layer_of_experts_is_edited(model: LanguageModel, params: Params) -> None:
    asked = Rank1(matrices=["k", "o"], strengths=[0.1], tokens=256, controls={"random": 19})
    setting = Setting(model, params, params, False, EXAMPLES, 0)
    rows = asked.rows(setting, lambda metrics, done: None)
    kl = {row["arm"]: row["value"] for row in rows if row["quantity"] == "kl_from_unedited"}
    assert len(kl) == 21 and min(kl.values()) > 0  # 19 draws and the treatments of both kinds
