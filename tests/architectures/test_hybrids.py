"""Mixers that are no softmax attention: their rows, their edits, and their place in tables and figures."""

from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch
from networks import CONFIGS, MIXTURES, language_model, save
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText, NemotronHConfig

from weightgeom.causal.effects import Effects, Evaluation
from weightgeom.check import failure
from weightgeom.figures.base import COLOURS, ratio_by_layer
from weightgeom.interfaces import Setting
from weightgeom.interventions.rank1 import Rank1
from weightgeom.models.experts import unstacked
from weightgeom.models.invariants import (
    decays_act_on_the_past,
    keys_act_through_queries,
    mixer_units_stay_apart,
    mixers_act_in_their_time_and_heads,
)
from weightgeom.models.loading import load
from weightgeom.models.residual import MIXER, WRITES, Architecture, ResidualMatrix, architecture_of
from weightgeom.models.specimen import Specimen
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum
from weightgeom.table import tabulate
from weightgeom.text.tokens import Batch

HYBRIDS = ("qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "nemotron_h")
LINEAR = ["linear_q", "linear_k", "linear_v", "linear_z", "linear_b", "linear_a", "linear_o"]
MAMBA = ["mamba_z", "mamba_x", "mamba_B", "mamba_C", "mamba_dt", "mamba_o"]
OF_MIXERS = (
    *(mixer_units_stay_apart, decays_act_on_the_past, keys_act_through_queries),
    mixers_act_in_their_time_and_heads,
)
EFFECTS = Effects(tokens=48, length=12, pairs=2, pair_length=32, questions=2)


@cache
def right(name: str) -> Specimen:
    return Specimen.of((CONFIGS | MIXTURES)[name](50, 16))


def labels(name: str, layer: int) -> list[str]:
    return [m.label for m in right(name).architecture.matrices if m.layer == layer and m.expert is None]


def test_every_layer_has_the_matrices_that_it_is_made_of():
    mlp = ["gate", "up", "down"]
    softmax = ["q", "k", "v", "attention_gate", *mlp[:2], "o", "down"]
    assert labels("qwen3_5_text", 0) == [*LINEAR[:3], "linear_z", "linear_b", "linear_a", "linear_o", *mlp]
    assert labels("qwen3_5_text", 1) == softmax
    experts = ["router", "shared_gate", "shared_up", "shared_down", "shared_router"]
    assert labels("qwen3_next", 0) == [*LINEAR, *experts]
    assert labels("lfm2", 0) == ["conv_B", "conv_C", "conv_x", "conv_o", *mlp]
    assert labels("falcon_h1", 1) == [*MAMBA, "q", "k", "v", "gate", "up", "o", "down"]
    layers = [labels("nemotron_h", layer) for layer in range(4)]
    assert layers == [MAMBA, ["q", "k", "v", "o"], ["up", "down"], MAMBA]
    assert labels("nemotron_h_moe", 0) == ["router", "shared_up", "shared_down"]


def test_the_sites_of_a_layer_are_those_of_its_parts():
    def sites(name: str) -> list[str]:
        return [f"{site.layer} {site.name}" for site in right(name).architecture.sites]

    assert sites("qwen3_5_text") == ["0 mixer_input", "0 mlp_input", "1 attention_input", "1 mlp_input"]
    assert sites("nemotron_h") == ["0 mixer_input", "1 attention_input", "2 mlp_input", "3 mixer_input"]
    assert sites("falcon_h1")[:3] == ["0 mixer_input", "0 attention_input", "0 mlp_input"]


def test_mixers_read_with_all_but_their_output():
    assert {kind for kind in MIXER if kind in WRITES} == {"linear_o", "conv_o", "mamba_o"}
    matrices = [ResidualMatrix(0, kind, "m") for kind in sorted(MIXER)]
    assert {m.site for m in matrices} == {"mixer_input", "mixer_output"}
    assert {m.kind for m in matrices if m.role == "write"} == {"linear_o", "conv_o", "mamba_o"}


def exchanged(architecture: Architecture, first: ResidualMatrix, second: ResidualMatrix) -> Architecture:
    """The map in which two matrices of a layer have each other's place and heads."""
    places = {
        first: replace(second, kind=first.kind),
        second: replace(first, kind=second.kind),
    }
    return replace(architecture, matrices=tuple(places.get(m, m) for m in architecture.matrices))


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
def test_no_two_reads_of_a_mixer_can_be_exchanged_unnoticed(name):
    architecture, config = right(name).architecture, right(name).network.config
    reads = [m for m in architecture.matrices if m.layer == 0 and m.block == "mixer" and m.role == "read"]
    for read, other in combinations(reads, 2):
        wrong = Specimen.of(config, exchanged(architecture, read, other))
        is_found = any(failure(invariant, wrong) is not None for invariant in OF_MIXERS)
        # The two factors of a convolution's input are equals: B x is x B.
        assert is_found != ({read.kind, other.kind} == {"conv_B", "conv_x"}), (read.kind, other.kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1", "nemotron_h"])
def test_an_edit_of_any_part_has_the_effects_of_the_network_that_has_it(name, tokenizer, examples):
    # Modules before an edit are passed over: their kept outputs must equal those of the edited network.
    model, params = language_model(name, tokenizer)
    evaluation = Evaluation(model, params, examples, EFFECTS)
    kinds = {matrix.kind: matrix for matrix in model.architecture.matrices}  # the last layer that has one
    for matrix in kinds.values():
        edited = matrix.replaced(evaluation.params, 1.5 * matrix.of(evaluation.params))
        effects, expected = evaluation.samples(edited), Evaluation(model, edited, examples, EFFECTS).unedited
        for quantity in ("heldout_ce", "preference_margin"):
            assert_close(effects[quantity], expected[quantity], rtol=1e-4, atol=1e-4)
        assert float(effects["kl_from_unedited"].max()) > 0, matrix.name


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "nemotron_h"])
def test_the_heads_of_a_mixer_add_up_to_it(name, tokenizer, examples, generator):
    model, weights = language_model(name, tokenizer)
    start = unstacked(weights, model.architecture.stacks)
    mixer = [m for m in model.architecture.matrices if m.block == "mixer" and m.layer == 0]
    end = start
    for matrix in mixer:
        end = matrix.replaced(end, matrix.of(end) + torch.randn(matrix.of(end).shape, generator=generator))
    probe = RSF(resamples=0, tokens=256, prompts=0, per_head=True)
    rows = probe.measurement(Setting(model, start, end, False, examples, 0))(end)
    for matrix in mixer:
        of_kind = [row for row in rows if row["matrix"] == matrix.kind and row["quantity"] == "fraction"]
        of_heads = {row["head"]: row["value"] for row in of_kind if row.get("head") is not None}
        assert sorted(of_heads) == list(range(matrix.heads)), matrix.name
        # Shares of parts of one matrix: the whole's is their mean, weighted by energy.
        (whole,) = [
            row["value"] for row in of_kind if row.get("head") is None and row["subspace"] != "random"
        ]
        own = [row["value"] for row in of_kind if row.get("head") is not None and row["subspace"] != "random"]
        assert min(own) <= whole <= max(own)


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1", "nemotron_h"])
def test_the_other_probes_and_a_figure_have_every_part(name, tokenizer, examples):
    model, params = language_model(name, tokenizer)
    after = {key: weight + 0.01 * torch.randn_like(weight) for key, weight in params.items()}
    setting = Setting(model, params, after, False, examples, 0)
    kinds = {matrix.kind for matrix in model.architecture.matrices}
    assert kinds <= set(COLOURS)
    rows = Spectrum(tokens=256).measurement(setting)(after)
    assert {row["matrix"] for row in rows if row["quantity"] == "delta_top_share"} == kinds
    inputs = {row["subspace"]: row["matrix"] for row in rows if row["quantity"] == "activation_top_share"}
    assert inputs["mixer_input"] in ("linear_q", "conv_B", "mamba_z") and inputs["attention_input"] == "q"
    rows = Overlap(tokens=256).measurement(setting)(after)
    at_mixers = {row["layer"] for row in rows if row["subspace"] == "delta:mixer_input"}
    assert at_mixers == {m.layer for m in model.architecture.matrices if m.block == "mixer"}
    rows = RSF(resamples=0, tokens=256, prompts=0).measurement(setting)(after)
    means = {(row["role"], row["matrix"]) for row in rows if row["quantity"] == "ratio_mean"}
    of_matrices = {(matrix.role, matrix.kind) for matrix in model.architecture.matrices}
    assert means == of_matrices | {("read", ""), ("write", "")}
    table = tabulate([{"step": 1, **row} for row in rows])
    drawn = {str(line.get_label()) for axis in ratio_by_layer(table, 1).axes for line in axis.get_lines()}
    assert kinds <= drawn


def test_controls_from_other_layers_are_those_of_layers_with_such_a_matrix(tokenizer):
    architecture = language_model("qwen3_5_text", tokenizer)[0].architecture
    message = r"controls\.layer is 1, and there are 0 other layers with a matrix linear_k"
    with pytest.raises(ValueError, match=message):
        Rank1(matrices=["linear_k"], controls={"random": 39, "layer": 1}).check(architecture)
    with pytest.raises(ValueError, match=r"the model has no matrix mamba_x; it has attention_gate, down"):
        Rank1(matrices=["mamba_x"]).check(architecture)


def test_experts_that_read_a_projection_are_refused():
    config = NemotronHConfig(layers_block_type=["moe", "full_attention"], moe_latent_size=16)
    with pytest.raises(NotImplementedError, match=r"whose experts read a projection \(moe_latent_size\)"):
        architecture_of(config)


def test_a_checkpoint_with_stacked_experts_is_read_expert_by_expert(tmp_path, tokenizer):
    directory = save("qwen3_5_moe_text", tmp_path / "moe")
    model = load(directory, "cpu")
    params = model.params(directory)
    shapes = {m.name: tuple(m.of(params).shape) for m in model.architecture.matrices if m.layer == 0}
    assert shapes["L0.up.2"] == (12, 32) and shapes["L0.down.2"] == (32, 12)
    assert shapes["L0.shared_up"] == (14, 32) and shapes["L0.shared_router"] == (1, 32)


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_a_model_that_sees_computes_as_within_it(model_type, tmp_path, tokenizer):
    text = (CONFIGS | MIXTURES)[f"{model_type}_text"](len(tokenizer), 128)
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    seeing = {**sizes, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = AutoConfig.for_model(model_type, text_config=text.to_dict(), vision_config=seeing)
    network = AutoModelForImageTextToText.from_config(config).eval()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path, "cpu")
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    with torch.no_grad():
        expected = network(input_ids=ids).logits
    assert_close(model.logits(model.hold(model.params(tmp_path)), batch), expected, rtol=1e-5, atol=1e-6)
