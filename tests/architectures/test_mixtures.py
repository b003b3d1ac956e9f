"""Mixtures of experts and latent attention: their maps by the networks' own weights, measured and trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import MIXTURES
from safetensors.torch import save_file
from small import TRAINING, WORLD, Curves
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from weightgeom.figures.base import COLOURS
from weightgeom.interfaces import Setting
from weightgeom.interventions.rank1 import Rank1
from weightgeom.models.experts import names_on_disk
from weightgeom.models.loading import load, load_network
from weightgeom.models.residual import Architecture, Kind, architecture_of, chosen
from weightgeom.models.weights import Stored
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.moments import Moments
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum
from weightgeom.table import Row, tabulate
from weightgeom.text.tokens import packed
from weightgeom.training.fit import fit
from weightgeom.training.resuming import restored_weights

EXAMPLES, TOKENIZER = WORLD.examples(), WORLD.tokenizer()
TYPES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "deepseek_v3_full_q", "llama4_text")
K = 4
TOKENS = 256
EDITED: dict[str, list[Kind]] = {
    "deepseek_v3": ["q_a", "kv_a", "k_rope", "o", "shared_up", "shared_down"],
    "deepseek_v3_full_q": ["q", "k_rope", "o"],
    "llama4_text": ["k", "o", "shared_gate", "shared_down"],
}
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")


def architecture(name: str) -> Architecture:
    return architecture_of(MIXTURES[name](50, 16))


def network_of(name: str) -> PreTrainedModel:
    """A random network whose gains are not all one, with biases for balance where the type has them."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(MIXTURES[name](len(TOKENIZER), 128))
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            parameter.copy_(torch.randn_like(parameter) / 4 + ("norm" in key))
        for key, buffer in network.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer))
    return network.eval()


def saved(network: PreTrainedModel, directory: Path) -> Path:
    network.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def by_hand(network: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Every matrix (d_out, d_in) as a view of the network's own parameters, without the map."""
    w, matrices = dict(network.named_parameters()), {}
    for layer in range(2):
        attention, block = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        if name == "llama4_text":
            block = block.replace("mlp", "feed_forward")
        if name.startswith("deepseek"):
            q = "q" if name.endswith("full_q") else "q_a"
            both = w[f"{attention}.kv_a_proj_with_mqa.weight"]
            of_layer = {q: w[f"{attention}.{q}_proj.weight"], "kv_a": both[:12], "k_rope": both[12:]}
        else:
            of_layer = {kind: w[f"{attention}.{kind}_proj.weight"] for kind in ("q", "k", "v")}
        of_layer["o"] = w[f"{attention}.o_proj.weight"]
        if f"{block}.experts.gate_up_proj" not in w:
            of_layer |= {kind: w[f"{block}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        else:
            router = "router" if name in ("gpt_oss", "llama4_text") else "gate"
            of_layer["router"] = w[f"{block}.{router}.weight"]
            for kind in ("gate", "up", "down"):
                for shared in ("shared_experts", "shared_expert"):
                    if (weight := w.get(f"{block}.{shared}.{kind}_proj.weight")) is not None:
                        of_layer[f"shared_{kind}"] = weight
            pairs, downs = w[f"{block}.experts.gate_up_proj"], w[f"{block}.experts.down_proj"]
            for expert, (pair, down) in enumerate(zip(pairs, downs, strict=True)):
                if name == "gpt_oss":
                    gate, up, down = pair[:, ::2].T, pair[:, 1::2].T, down.T
                elif name == "llama4_text":
                    width = pair.shape[1] // 2
                    gate, up, down = pair[:, :width].T, pair[:, width:].T, down.T
                else:
                    gate, up = pair.chunk(2)
                of_layer |= {f"gate.{expert}": gate, f"up.{expert}": up, f"down.{expert}": down}
        matrices |= {f"L{layer}.{label}": weight for label, weight in of_layer.items()}
    return matrices


def names(rows: list[Row], quantity: str) -> dict[str, float]:
    """One quantity of whole matrices at their own subspaces, by matrix."""
    return {
        f"L{row['layer']}.{label(row)}": row["value"]
        for row in rows
        if row["quantity"] == quantity
        and row.get("subspace") != "random"
        and row.get("layer") is not None
        and "parameter" not in row
    }


@pytest.mark.parametrize("name", TYPES)
def test_the_map_has_the_networks_own_matrices(name, tmp_path):
    network = network_of(name)
    directory = saved(network, tmp_path)
    model = load(directory, "cpu")
    params = model.params(directory)
    assert isinstance(params, Stored)
    expected = by_hand(network, name)
    assert {matrix.name for matrix in model.architecture.matrices} == set(expected)
    for matrix in model.architecture.matrices:
        assert torch.equal(matrix.of(params), expected[matrix.name])
        assert params[matrix.parameter].shape == params.shape(matrix.parameter)


@pytest.mark.parametrize("name", TYPES)
def test_the_logits_of_a_checkpoint_are_those_that_transformers_makes_of_it(name, tmp_path):
    directory = saved(network_of(name), tmp_path)
    (batch, *_) = packed(EXAMPLES.heldout, TOKENIZER, 24, 96)
    network = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = network(batch.input_ids, attention_mask=batch.attention_mask).logits
    model = load(directory, "cpu")
    params = model.params(directory)
    patched = model.with_weights(params)
    for actual in (
        model.logits(model.hold(params), batch),
        model.streaming(params).logits({}, batch),
        patched(batch.input_ids, attention_mask=batch.attention_mask).logits,
    ):
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_experts_that_the_disk_holds_in_stacks_are_those_that_it_holds_apart(name, tmp_path):
    network = network_of(name)
    directory = saved(network, tmp_path)
    model = load(directory, "cpu")
    expected = {key: value.clone() for key, value in model.params(directory).items()}
    save_file(network.state_dict(), directory / "model.safetensors")
    loaded = model.params(directory)
    assert_close(dict(loaded), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_state_of_a_training_gives_back_the_stacks_of_experts(name, tmp_path):
    network = network_of(name)
    other = AutoModelForCausalLM.from_config(network.config)
    with restored_weights(other, saved(network, tmp_path), architecture(name)):
        pass
    assert_close(dict(other.named_parameters()), dict(network.named_parameters()), rtol=0, atol=0)


def test_the_disk_has_the_names_of_transformers_own_map():
    stacks = architecture("mixtral").stacks
    renamed = names_on_disk("mixtral", ["model.layers.0.mlp.gate.weight"], stacks)
    assert renamed["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
    ours = {
        key: renamed[f"model.layers.1.block_sparse_moe.experts.2.{key}.weight"] for key in ("w1", "w2", "w3")
    }
    kinds = {"w1": "gate", "w2": "down", "w3": "up"}
    assert ours == {key: f"model.layers.1.mlp.experts.2.{kind}_proj.weight" for key, kind in kinds.items()}
    assert architecture("olmoe").aliases == architecture("gpt_oss").aliases == {}


def test_a_type_whose_stacks_are_made_in_another_way_is_refused():
    stacks = architecture("gpt_oss").stacks
    with pytest.raises(
        NotImplementedError, match=r"no way to read model\.layers\.0\.mlp\.experts\.gate_up_proj"
    ):
        names_on_disk("mixtral", [], stacks)


@pytest.fixture(scope="module", params=TYPES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Setting]:
    """A type, and a DPO training of two steps from a checkpoint of it."""
    name, directory = request.param, tmp_path_factory.mktemp(request.param)
    base = saved(network_of(name), directory / "base")
    training, curves = replace(TRAINING, log_gradients=True), Curves()
    options = {"name": name, "seed": 0, "device": "cpu", "log_metrics": curves, "start": base}
    network = load_network(base)
    trajectory = fit(DPO(), network, TOKENIZER, EXAMPLES, training, directory / "trained", **options)
    balanced = name in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")  # adds a term of its own to ln 2
    assert (curves.by_step[1]["loss"] == pytest.approx(0.693147, abs=1e-5)) != balanced
    kinds = {matrix.kind for matrix in architecture(name).matrices}
    assert {f"grad_norm/{kind}" for kind in kinds} <= curves.by_step[1].keys()
    model = load(base, "cpu")
    start = model.params(base)
    end = model.params(trajectory.steps[trajectory.last], start)
    return name, Setting(model, start, end, False, EXAMPLES, 0, DPO(), training, trajectory.last)


def test_what_dpo_trains_is_measured_matrix_by_matrix(trained):
    _, setting = trained
    matrices = {matrix.name: matrix for matrix in setting.model.architecture.matrices}
    rows = RSF(k=K, resamples=0, tokens=TOKENS, prompts=8, per_head=True).measurement(setting)(setting.end)
    assert set(names(rows, "ratio")) <= set(names(rows, "delta_norm")) == set(matrices)
    moved = {label for label, norm in names(rows, "delta_norm").items() if norm > 0}
    assert {matrices[label].kind for label in moved} == {matrix.kind for matrix in matrices.values()}
    measured = names(rows, "ratio")
    families: dict[bool, set[int]] = {True: set(), False: set()}
    for row in rows:
        if row["quantity"] == "q_value" and row["subspace"] != "random" and row.get("head") is None:
            families[row["expert"] is not None].add(row["n"])
    of_experts = sum(matrices[label].expert is not None for label in measured)
    assert families[True] == {of_experts}  # a family of their own, in which shared experts are not
    assert families[False] == {len(measured) - of_experts}
    means = {row["matrix"] for row in rows if row["quantity"] == "ratio_mean" and row["matrix"]}
    assert means == {matrices[label].kind for label in measured}


def test_the_other_probes_measure_it_as_well(trained):
    _, setting = trained
    known = {matrix.name for matrix in setting.model.architecture.matrices}
    for probe in (Moments(prompts=8, tokens=TOKENS, resamples=0), Spectrum(tokens=TOKENS), Overlap()):
        probe.check(setting.model.architecture)
        rows = probe.measurement(setting)(setting.end)
        assert len(tabulate({"step": 0, **row} for row in rows))  # which refuses values that are not finite
        placed = [row for row in rows if "expert" in row and row["layer"] is not None]
        assert placed and {f"L{row['layer']}.{label(row)}" for row in placed} <= known


def test_attention_and_shared_experts_are_edited(trained):
    name, setting = trained
    kinds = EDITED.get(name, ["k", "o"])
    edit = Rank1(matrices=kinds, layers=[1], strengths=[0.1], tokens=TOKENS, controls={"random": 19})
    edit.check(setting.model.architecture)
    rows = edit.rows(setting, lambda metrics, done: None)
    kl = [row for row in rows if row["quantity"] == "kl_from_unedited"]
    assert {row["matrix"] for row in kl} == set(kinds) and len(kl) == 20 * len(kinds)
    assert min(row["value"] for row in kl) > 0


@pytest.mark.parametrize("name", TYPES)
def test_routed_experts_are_not_edited(name):
    with pytest.raises(
        ValueError, match=r"L\d\.up\.0 is part of a mixture of experts, which cannot be edited"
    ):
        chosen(architecture(name), ["up"], None)


@pytest.mark.parametrize("name", TYPES)
def test_every_kind_has_a_colour_in_the_figures(name):
    assert {matrix.kind for matrix in architecture(name).matrices} <= set(COLOURS)


def label(row: Row) -> str:
    return row["matrix"] if row["expert"] is None else f"{row['matrix']}.{row['expert']}"
