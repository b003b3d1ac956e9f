from collections.abc import Mapping
from math import sqrt
from typing import Any

import networks
import pytest
import torch
from transformers import AutoModelForCausalLM

from runners.summary.curves import log_table
from weightgeom.analysis.summaries import by_matrix, unmoved
from weightgeom.estimators.other_parameters import change_of, other_parameters, parameter_rows
from weightgeom.interfaces import Setting
from weightgeom.models.adapters import Adapted, LowRank
from weightgeom.models.experts import unstacked
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.probes.rsf import RSF
from weightgeom.table import of_matrices, tabulate


@pytest.mark.parametrize("name", networks.CONFIGS | networks.MIXTURES)
def test_every_parameter_of_every_type_has_rows_of_its_own_or_is_one_of_matrices(name, tokenizer, examples):
    config = (networks.CONFIGS | networks.MIXTURES)[name](len(tokenizer), 128)
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = LanguageModel(network, tokenizer, architecture_of(config))
    state = unstacked(network.state_dict(), model.architecture.stacks)
    for matrix in model.architecture.matrices:  # unmoved, as the sizes need neither text nor gradients
        state[matrix.parameter] = state[matrix.parameter].clone()
    rows = RSF().measurement(Setting(model, state, state, False, examples, 0))(state)
    named = [row["parameter"] for row in rows if "parameter" in row and row["quantity"] == "delta_norm"]
    assert len(named) == len(set(named))
    of_matrices = {matrix.parameter for matrix in model.architecture.matrices}
    tied = {model.architecture.unembed} if model.architecture.tied else set()
    assert set(named) | of_matrices | tied == state.keys()
    assert not set(named) & (of_matrices | tied)
    entries = {name: 0 for name in of_matrices}
    for matrix in model.architecture.matrices:
        entries[matrix.parameter] += matrix.of(state).numel()
    assert entries == {name: state[name].numel() for name in of_matrices}  # no rows of a fused one are left


def test_kinds_and_layers_are_those_of_the_parameters(tokenizer):
    kinds = {}
    for name in ("gpt2", "deepseek_v3", "qwen3_next", "gpt_oss"):
        config = (networks.CONFIGS | networks.MIXTURES)[name](len(tokenizer), 128)
        network = AutoModelForCausalLM.from_config(config)
        model = LanguageModel(network, tokenizer, architecture_of(config))
        for parameter in other_parameters(model, unstacked(network.state_dict(), model.architecture.stacks)):
            kinds[parameter.name] = (parameter.kind, parameter.layer)
    assert kinds["transformer.wte.weight"] == ("embed", None)
    assert kinds["transformer.wpe.weight"] == ("position", None)
    assert kinds["transformer.h.1.attn.c_attn.bias"] == ("bias", 1)
    assert kinds["transformer.ln_f.weight"] == ("norm", None)
    assert kinds["lm_head.weight"] == ("unembed", None)
    assert kinds["model.layers.1.self_attn.kv_b_proj.weight"] == ("inner", 1)
    assert kinds["model.layers.1.mlp.gate.e_score_correction_bias"] == ("bias", 1)
    assert kinds["model.layers.0.linear_attn.conv1d.weight"] == ("conv", 0)
    assert kinds["model.layers.0.linear_attn.A_log"] == ("A_log", 0)
    assert kinds["model.layers.0.self_attn.sinks"] == ("sinks", 0)
    assert kinds["model.layers.0.mlp.experts.gate_up_proj_bias"] == ("bias", 0)


def test_the_size_of_an_update_by_hand():
    before = {"w": torch.tensor([3.0, 4.0, 0.0, 1.0])}
    # bf16 has 8 bits of mantissa: 1 + 2^-10 rounds to 1, and 4 + 1 is another number.
    after = {"w": torch.tensor([3.0, 5.0, 0.0, 1.0 + 2**-10])}
    change = change_of("w", after, before)
    norm = sqrt(1 + 2**-20)
    assert change.norm == pytest.approx(norm, rel=1e-12) and change.before_norm == sqrt(26)
    assert (change.entries, change.moved_share, change.visible_share) == (4, 0.5, 0.25)
    assert change.rounding_share is None


def test_what_bf16_checkpoints_show_is_what_is_visible_in_fp32_ones(generator):
    before = torch.randn(64, 48, generator=generator)
    after = before + 1e-3 * torch.randn(64, 48, generator=generator)
    exact = change_of("w", {"w": after}, {"w": before})
    stored = change_of("w", {"w": after.bfloat16()}, {"w": before.bfloat16()})
    assert exact.moved_share == 1 and 0.1 < exact.visible_share < 0.9
    assert stored.moved_share == stored.visible_share == exact.visible_share


def test_the_rounding_share_is_that_of_the_error_that_rounding_made(generator):
    before = torch.randn(64, 48, generator=generator)
    after = before + 0.05 * torch.randn(
        64, 48, generator=generator
    )  # of several steps, so that errors differ
    halves = [{"w": weight.bfloat16()} for weight in (after, before)]
    delta = halves[0]["w"].float() - halves[1]["w"].float()
    share = float((delta - (after - before)).square().sum() / delta.square().sum())
    assert change_of("w", *halves).rounding_share == pytest.approx(share, rel=0.1)  # of 3072 errors: sd 2 %


def test_a_relative_norm_is_left_out_of_what_was_zero(tokenizer):
    model, params = networks.language_model("gpt2", tokenizer)
    (bias,) = (
        parameter
        for parameter in other_parameters(model, params)
        if parameter.name == "transformer.h.0.ln_1.bias"
    )
    start = {bias.name: torch.zeros(32)}
    rows = list(parameter_rows(bias, change_of(bias.name, {bias.name: torch.ones(32)}, start)))
    assert [row["quantity"] for row in rows] == ["delta_norm", "moved_share", "visible_share"]


def test_an_update_that_is_not_finite_and_two_shapes_are_refused():
    zero = {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match="the update of w has entries that are not finite"):
        change_of("w", {"w": torch.tensor([0.0, float("nan"), 0.0])}, zero)
    with pytest.raises(ValueError, match=r"w is of shape \(1, 4\) after and of shape \(1, 3\) before"):
        change_of("w", {"w": torch.zeros(4)}, zero)


def test_the_update_of_an_adapted_embedding_is_that_of_its_factors(generator):
    base = {"embed": torch.randn(20, 6, generator=generator).bfloat16()}
    b = 1e-6 * torch.randn(20, 2, generator=generator)
    a = torch.randn(2, 6, generator=generator)
    after = Adapted(base, {"embed": LowRank(b, a)}, {}, frozenset())
    change = change_of("embed", after, base, by_row=True)
    delta = b.double() @ a.double()  # which is far below the fp32 spacing of the weights
    assert change.norm == pytest.approx(float(delta.norm()), rel=1e-6)
    assert change.gram is not None and change.lengths is not None and change.rounding_share is None
    torch.testing.assert_close(change.gram.double(), delta.T @ delta, rtol=1e-5, atol=1e-18)
    torch.testing.assert_close(change.lengths, delta.norm(dim=1), rtol=1e-6, atol=0)


def test_other_parameters_change_no_number_of_matrices(model, params, examples, generator):
    matrices = {matrix.parameter for matrix in model.architecture.matrices}
    noise = {name: 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in params.items()}
    moved = {name: params[name] + noise[name] for name in params}
    alone = {name: moved[name] if name in matrices else params[name] for name in params}
    setting = Setting(model, params, moved, False, examples, 0)
    tables = []
    for end in (moved, alone):
        rows = RSF(tokens=512, resamples=0).measurement(setting)(end)
        tables.append([row for row in rows if "parameter" not in row])
    assert tables[0] == tables[1]


def test_other_parameters_have_no_curve_and_no_line_in_the_summary_of_matrices(model, params, examples):
    end = {name: weight + 0.1 * torch.ones_like(weight).cumsum(0).sin() for name, weight in params.items()}
    rows = RSF(tokens=512, resamples=0).measurement(Setting(model, params, end, False, examples, 0))(end)
    table = tabulate({"step": 1, **row} for row in rows)
    kinds = {"q", "k", "v", "up", "o", "down"}
    for quantity in ("ratio", "null_ratio_sd", "delta_norm"):
        assert set(of_matrices(table, quantity)["matrix"]) == kinds
    assert set(by_matrix(table, "ratio")["matrix"]) == set(unmoved(table)["matrix"]) == kinds
    curves: Any = Curves()
    log_table(curves, "rsf", "", table, RSF.declaration)
    assert curves.names == {f"{name}/{kind}" for name in ("rsf", "rsf_by_layer") for kind in kinds}


class Curves:
    """A record that keeps the names of metrics."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.names |= metrics.keys()
