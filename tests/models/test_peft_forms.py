"""Adapters as PEFT itself saves them have the logits that PEFT itself computes with them."""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import llamas
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from weightgeom.bases.pretrained import TwoCheckpoints
from weightgeom.models.adapters import OPTIONS, VARIANTS
from weightgeom.models.loading import load
from weightgeom.params import Params
from weightgeom.text.tokens import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]
IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
BATCH = Batch(IDS, torch.ones_like(IDS), torch.ones_like(IDS).bool())
ALL = ["q_proj", "o_proj"]


def adapted(home: Path, tied: bool, rows: int = 0, **config: Any) -> tuple[Path, Path, PeftModel]:
    """A base, an adapter of it whose every tensor has moved, and PEFT's network of both."""
    base = llamas.saved(llamas.llama(0, tie_word_embeddings=tied), home / "base")
    network = LlamaForCausalLM.from_pretrained(base)
    if rows:
        network.resize_token_embeddings(len(llamas.TOKENIZER) + rows)
    options: dict[str, Any] = {"target_modules": ALL} | config
    model = get_peft_model(network, LoraConfig(r=3, lora_alpha=8, **options))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(home / "adapter"))
    llamas.TOKENIZER.save_pretrained(home / "adapter")
    return base, home / "adapter", model.eval()


def opened(base: Path, adapter: Path) -> Params:
    TwoCheckpoints(str(base), str(adapter)).check(None)
    model = load(base, "cpu")
    return model.params(adapter, model.params(base))


def logits(base: Path, params: Params) -> list[Tensor]:
    """By the three ways in which a model is run."""
    model = load(base, "cpu")
    inputs = {"input_ids": IDS, "use_cache": False}
    with torch.no_grad():
        return [
            model.logits(model.hold(params), BATCH),
            model.with_weights(params)(**inputs).logits,
            model.streaming(params).logits({}, BATCH),
        ]


FORMS: dict[str, dict[str, Any]] = {
    "all_linear": {"target_modules": "all-linear"},
    "embedding_and_head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embedding_alone": {"target_modules": ["embed_tokens", "q_proj"]},
    "head_alone": {"target_modules": ["lm_head", "q_proj"]},
    "trained_embedding": {"modules_to_save": ["embed_tokens"]},
    "trained_head": {"modules_to_save": ["lm_head"]},
    "trained_both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained_norm": {"modules_to_save": ["input_layernorm", "norm"]},
    "kept_tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "kept_tied_factors": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_has_the_logits_that_peft_computes(form: str, tied: bool, tmp_path: Path):
    base, adapter, model = adapted(tmp_path, tied, **FORMS[form])
    expected = model(input_ids=IDS).logits.detach()
    for computed in logits(base, opened(base, adapter)):
        assert_close(computed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", [{}, FORMS["embedding_and_head"], FORMS["trained_both"]])
def test_of_resized_embeddings_the_shared_rows_are_taken(
    form: dict[str, Any], tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base, adapter, model = adapted(tmp_path, tied, rows=5, **form)
    tokens = len(llamas.TOKENIZER)
    expected = model(input_ids=IDS).logits.detach()[..., :tokens]
    with caplog.at_level(logging.WARNING):
        params = opened(base, adapter)
    for computed in logits(base, params):
        assert_close(computed, expected, rtol=1e-4, atol=1e-4)
    assert f"has {tokens + 5} rows of model.embed_tokens.weight and its base {tokens}" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_prefixes_and_names_of_the_adapter_in_its_keys_are_passed_over(prefix: str, tmp_path: Path):
    base, adapter, _ = adapted(tmp_path, False, modules_to_save=["lm_head"])
    expected = dict(opened(base, adapter))
    path = adapter / "adapter_model.safetensors"
    weights = {
        prefix
        + key.replace(
            ".weight", ".style.weight" if "lora_" in key else ".modules_to_save.style.weight"
        ): weight
        for key, weight in load_file(path).items()
    }
    save_file(weights, path)
    assert_close(dict(opened(base, adapter)), expected, rtol=0, atol=0)


def test_an_adapter_of_a_text_model_within_another_finds_its_matrices(tmp_path: Path):
    base, adapter, _ = adapted(tmp_path, False)
    expected = dict(opened(base, adapter))
    path = adapter / "adapter_model.safetensors"
    inner = {
        key.replace("model.layers", "model.language_model.layers"): w for key, w in load_file(path).items()
    }
    save_file(inner, path)
    assert_close(dict(opened(base, adapter)), expected, rtol=0, atol=0)


def test_factors_of_two_adapters_in_one_file_are_refused(tmp_path: Path):
    base, adapter, _ = adapted(tmp_path, False)
    path = adapter / "adapter_model.safetensors"
    plain = load_file(path)
    save_file(
        plain | {key.replace(".weight", ".style.weight"): weight + 1 for key, weight in plain.items()}, path
    )
    with pytest.raises(ValueError, match=r"holds factors of more than one adapter for model\.layers"):
        opened(base, adapter)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (96,)])
def test_factors_that_were_not_gathered_are_refused(shape: tuple[int, ...], tmp_path: Path):
    base, adapter, _ = adapted(tmp_path, False)
    path = adapter / "adapter_model.safetensors"
    save_file({key: torch.zeros(shape) for key in load_file(path)}, path)
    with pytest.raises(
        ValueError, match=r"of shape \(.*\), empty or partial: save the adapter again with its"
    ):
        opened(base, adapter)
    save_file({}, path)
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors holds no LoRA factors: save the adapter"
    ):
        opened(base, adapter)


def test_an_adapter_before_its_first_step_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base = llamas.saved(llamas.llama(0), tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=ALL))
    model.save_pretrained(str(tmp_path / "adapter"))
    with caplog.at_level(logging.WARNING):
        opened(base, tmp_path / "adapter")
    assert f"no matrix moved: all factors lora_B of {tmp_path / 'adapter'} are zero" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_a_quantised_adapter_is_refused(dtype: torch.dtype, tmp_path: Path):
    base, adapter, _ = adapted(tmp_path, False)
    path = adapter / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(
        ValueError, match=rf"of dtype {dtype}, so the adapter is quantised: save it in float32"
    ):
        opened(base, adapter)


def test_an_option_that_peft_does_not_have_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert {field.name for field in fields(LoraConfig)} <= {*VARIANTS, *OPTIONS}
    base, adapter, _ = adapted(tmp_path, False)
    opened(base, adapter)
    assert "options" not in caplog.text
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_twist": True, "twist_to": None}))
    opened(base, adapter)
    assert f"{path} has options that are not known and not used (use_twist=True): check" in caplog.text
