"""Every way in refuses a quantised checkpoint by name, before anything runs."""

import json
from pathlib import Path
from typing import Any

import llamas
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightgeom as wg
from weightgeom.bases.chain import Chain
from weightgeom.bases.pretrained import Pretrained, TwoCheckpoints
from weightgeom.models.quantisation import check_not_quantised

Q = "model.layers.0.self_attn.q_proj"
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "by_config": ({"quantization_config": INT8}, {}, r"bitsandbytes, 8 bits"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, {}, r"by its config\.json, 4 bits"),
    "int8": ({}, {f"{Q}.weight": torch.ones(32, 32, dtype=torch.int8)}, rf"{Q}\.weight is of dtype I8"),
    "fp8": ({}, {f"{Q}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}, r"is of dtype F8_E4M3"),
    "complex": ({}, {f"{Q}.weight": torch.ones(32, 32, dtype=torch.complex64)}, r"is of dtype C64"),
    "scale": ({}, {f"{Q}.weight_scale_inv": torch.ones(1, 1)}, rf"it holds {Q}\.weight_scale_inv"),
}


def quantised(directory: Path, form: str) -> Path:
    """A checkpoint that says so in its config or has such tensors, and is otherwise sound."""
    llamas.saved(llamas.llama(1), directory)
    config, tensors, _ = FORMS[form]
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file(load_file(directory / "model.safetensors") | tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_checkpoint_is_refused_however_it_is_given(form: str, tmp_path: Path):
    plain, bad = llamas.saved(llamas.llama(0), tmp_path / "plain"), quantised(tmp_path / "bad", form)
    message = rf"bad is quantised \(.*{FORMS[form][2]}.*\), so its tensors are not its weights: give the"
    for before, after in ((plain, bad), (bad, plain)):
        with pytest.raises(ValueError, match=message):
            TwoCheckpoints(str(before), str(after)).check(None)
        with pytest.raises(ValueError, match=message):
            Chain({"base": str(before), "end": str(after)}).check(None)
        with pytest.raises(ValueError, match=message):
            wg.measure(before, after, texts=llamas.TEXTS)
    with pytest.raises(ValueError, match=message):
        Pretrained(str(bad)).check(16)


@pytest.mark.parametrize("form", ["int8", "fp8", "scale"])
def test_quantised_weights_in_memory_are_refused(form: str):
    network = llamas.llama(0)
    state = network.state_dict() | FORMS[form][1]
    with pytest.raises(ValueError, match=r"after is quantised \("):
        wg.measure(network, state, texts=llamas.TEXTS, tokenizer=llamas.TOKENIZER)


def test_a_network_that_was_loaded_with_quantisation_is_refused():
    network = llamas.llama(0)
    network.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"before is quantised \(gptq, 4 bits\)"):
        wg.measure(network, llamas.llama(1), texts=llamas.TEXTS, tokenizer=llamas.TOKENIZER)


@pytest.mark.parametrize(
    "name",
    [
        "q.SCB", "q.qweight", "q.qzeros", "q.g_idx", "q.scales", "q.weight.absmax", "q.weight_packed",
        "q.weight.quant_state.bitsandbytes__nf4", "mlp.experts.gate_up_proj_blocks", "q.input_scale",
        "mlp.experts.gate_up_proj_scales", "mlp.experts.down_proj_scale", "q.weight_scale_2", "q.zero_point",
        "q.weight.nested_absmax", "q.weight._data", "attn.k_scale",
        "q.Qidxs", "q.qscale", "q_proj.scale", "q_proj.zero", "q.weight:int_data", "q.q_scale",
    ],
)  # fmt: skip
def test_the_tensors_beside_quantised_weights_are_known_by_name(name: str):
    with pytest.raises(ValueError, match="is quantised"):
        check_not_quantised("here", {}, {name: ("F32", 1)})


@pytest.mark.parametrize("place", ["text_config", "llm_config", "language_config"])
def test_the_config_of_a_text_model_inside_another_says_how_it_is_quantised(place: str):
    with pytest.raises(ValueError, match=r"here is quantised \(awq, 4 bits\)"):
        check_not_quantised("here", {place: {"quantization_config": {"quant_method": "awq", "bits": 4}}}, {})


@pytest.mark.parametrize(
    "given",
    [
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": [-128, 128]},
        {"quant_method": "fp8", "weight_block_size": ["a", 128]},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": [1]},
    ],
)
def test_a_rule_that_makes_no_sense_is_not_read(given: dict[str, Any]):
    with pytest.raises(ValueError, match=r"here is quantised \((fp8|compressed-tensors)\)"):
        check_not_quantised("here", {"quantization_config": given}, {})


def test_tensors_of_plain_checkpoints_are_let_through():
    names = ("model.embed_tokens.weight", "attn.bias", "block_scale.weight", "layer_scalar", "embed_scale")
    check_not_quantised("here", {"quantization_config": None}, {name: ("BF16", 2) for name in names})
    check_not_quantised("here", {}, {"input_layernorm.scale": ("F32", 1), "logit_scale": ("F32", 0)})
    check_not_quantised("here", {}, {"vision.position_ids": ("I64", 2), "mask": ("BOOL", 4)})
    for dtype in ("F64", "F32", "F16", "torch.float64", "torch.float32", "torch.bfloat16", "float64"):
        check_not_quantised("here", {}, {"q.weight": (dtype, 2)})
