"""Pairs of quantised checkpoints have the table of their dequantised weights, and the share of their grid."""

from pathlib import Path
from typing import Any

import llamas
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from quantised import fp8_copy, mxfp4_copy, plain_copy
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import GptOssConfig, GptOssForCausalLM

import weightgeom as wg
from weightgeom.bases.pretrained import Pretrained
from weightgeom.models.codes import fp8_values, mxfp4_values
from weightgeom.models.loading import load_architecture, load_network
from weightgeom.models.weights import Dequantised, open_params
from weightgeom.probes.rsf import RSF

Q = "model.layers.0.self_attn.q_proj.weight"


def rows(before: Path, after: Path) -> pd.DataFrame:
    probe: Any = RSF(k=8, tokens=llamas.FEW)
    return wg.measure(before, after, texts=llamas.TEXTS, probes=[probe])


def without(table: pd.DataFrame, quantity: str) -> Any:
    return table[table["quantity"] != quantity].reset_index(drop=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("plain")
    start, end = llamas.llama(0), llamas.llama(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in end.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return llamas.saved(start, place / "before"), llamas.saved(end, place / "after")


@pytest.mark.parametrize("form", ["block", "tensor", "row"])
def test_an_fp8_pair_has_the_table_of_its_dequantised_weights(plain, tmp_path: Path, form: str):
    pairs: list[Path] = []
    for directory in plain:
        values = fp8_copy(directory, tmp_path / directory.name, form)
        pairs.append(plain_copy(directory, tmp_path / f"{directory.name}-plain", values))
    table, expected = rows(tmp_path / "before", tmp_path / "after"), rows(*pairs)
    assert len(expected) > 100 and "rounding_share" not in set(expected["quantity"])
    assert_frame_equal(without(table, "rounding_share"), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small gpt-oss networks that are close."""
    place = tmp_path_factory.mktemp("experts")
    made: Any = dict(vocab_size=len(llamas.TOKENIZER), hidden_size=32, intermediate_size=32, head_dim=8)
    made |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    network: Any = GptOssForCausalLM(GptOssConfig(**made, num_experts_per_tok=2, pad_token_id=None))
    torch.manual_seed(0)
    for name in ("before", "after"):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        llamas.saved(network, place / name)
    return place / "before", place / "after"


def test_an_mxfp4_pair_has_the_table_of_its_dequantised_weights(experts, tmp_path: Path):
    pairs: list[Path] = []
    for directory in experts:
        values = mxfp4_copy(directory, tmp_path / directory.name)
        pairs.append(plain_copy(directory, tmp_path / f"{directory.name}-plain", values))
    table, expected = rows(tmp_path / "before", tmp_path / "after"), rows(*pairs)
    shares = table[table["quantity"] == "rounding_share"]
    assert set(expected["matrix"]) > {"router", "gate", "up", "down"}
    assert set(shares["matrix"]) == {"gate", "up", "down"} and min(shares["value"]) > 0.001
    assert_frame_equal(without(table, "rounding_share"), expected, rtol=1e-6, atol=1e-6)


def test_an_expert_is_dequantised_alone(experts, tmp_path: Path, monkeypatch: Any):
    values = mxfp4_copy(experts[0], tmp_path / "mxfp4")
    params = open_params(tmp_path / "mxfp4", architecture := load_architecture(tmp_path / "mxfp4"))
    up = next(matrix for matrix in architecture.matrices if matrix.kind == "up" and matrix.expert == 1)
    sizes: list[int] = []
    taken = "weightgeom.models.weights.mxfp4_values"
    monkeypatch.setattr(
        taken, lambda blocks, scales: sizes.append(len(blocks)) or mxfp4_values(blocks, scales)
    )
    stack = values["model.layers.0.mlp.experts.gate_up_proj"]
    assert_close(params[up.parameter].float(), stack[1, :, 1::2].T, rtol=0, atol=0)
    assert sizes == [1]


def test_the_rounding_share_of_an_fp8_pair_is_that_of_the_error_that_its_grid_made(plain, tmp_path: Path):
    before, after = (
        (
            open_params(directory, load_architecture(directory)),
            fp8_copy(directory, tmp_path / directory.name, "block"),
        )
        for directory in plain
    )
    measured = after[1][Q] - before[1][Q]
    error = measured - (after[0][Q] - before[0][Q])
    table = rows(tmp_path / "before", tmp_path / "after")
    share = table[(table["quantity"] == "rounding_share") & (table["matrix"] == "q") & (table["layer"] == 0)]
    # of 1024 squared errors, each of relative sd 0.9 and of sizes that differ: four sd are below 15 %
    expected = float(error.square().sum() / measured.square().sum())
    assert 1e-3 < expected < 1 and share["value"].item() == pytest.approx(expected, rel=0.15)


def test_weights_are_dequantised_one_by_one_when_they_are_asked_for(plain, tmp_path: Path, monkeypatch: Any):
    values = fp8_copy(plain[0], tmp_path / "fp8", "block")
    params = open_params(tmp_path / "fp8", load_architecture(tmp_path / "fp8"))
    assert isinstance(params, Dequantised)
    read: list[tuple[int, ...]] = []
    taken = "weightgeom.models.weights.fp8_values"
    monkeypatch.setattr(taken, lambda codes, *rest: read.append(codes.shape) or fp8_values(codes, *rest))
    shapes = {name: params.shape(name) for name in params}
    assert shapes == {name: tuple(value.shape) for name, value in values.items()} and not read
    assert_close(params[Q], values[Q], rtol=0, atol=0)
    assert read == [(32, 32)]


def test_a_network_is_trained_from_dequantised_weights(plain, tmp_path: Path):
    values = fp8_copy(plain[0], tmp_path / "fp8", "block")
    assert Pretrained(str(tmp_path / "fp8")).check(16).d_model == 32
    state: dict[str, Tensor] = load_network(tmp_path / "fp8").state_dict()
    assert_close({name: state[name] for name in values}, values, rtol=0, atol=0)


def test_fp8_codes_without_scales_are_refused(plain, tmp_path: Path):
    fp8_copy(plain[0], tmp_path / "fp8", "block")
    path = tmp_path / "fp8" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "scale" not in name}, path)
    with pytest.raises(ValueError, match=r"is quantised \(.*_proj\.weight is of dtype F8_E4M3\)"):
        Pretrained(str(tmp_path / "fp8")).check(16)
