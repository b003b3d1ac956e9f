"""Of a model that also sees, the text part is what is measured, however its parameters are named on disk."""

from pathlib import Path

import pytest
import small
import torch
from networks import CONFIGS, MIXTURES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText, Mistral3Config, PreTrainedModel

from weightgeom.bases.sources import source_of
from weightgeom.estimators.updates import update_of
from weightgeom.models.loading import load, load_network
from weightgeom.models.residual import architecture_of, text_part
from weightgeom.objectives.dpo import DPO
from weightgeom.training.fit import fit

TOKENIZER = small.WORLD.tokenizer()
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT_PREFIX = "model.language_model."
NAMES = {
    "as saved": lambda name: name,
    "of 2025": lambda name: name.replace(TEXT_PREFIX, "language_model.model.").replace(
        "lm_head", "language_model.lm_head"
    ),
    "doubled": lambda name: name.replace(TEXT_PREFIX, f"{TEXT_PREFIX}model."),
}


SEEING = {  # the config of the whole, that of its eyes, and options of its own
    "gemma3": ("siglip_vision_model", {"image_size": 16, "patch_size": 8}, {"mm_tokens_per_image": 4}),
    "mistral3": (
        "pixtral", {"image_size": 16, "patch_size": 8, "head_dim": 8}, {"tie_word_embeddings": False}
    ),
    "llama4": (
        "llama4_vision_model",
        {"image_size": 16, "patch_size": 8, "vision_output_dim": 16, "projector_input_dim": 16,
         "projector_output_dim": 16},
        {},
    ),
    "qwen3_5": ("qwen3_5", {"patch_size": 8, "depth": 1, "num_heads": 2, "out_hidden_size": 32}, {}),
    "qwen3_5_moe": ("qwen3_5_moe", {"patch_size": 8, "depth": 1, "num_heads": 2, "out_hidden_size": 32}, {}),
}  # fmt: skip
TEXTS = {  # of each the texts' types; Mistral's wrapper has had two
    "gemma3": ("gemma3_text",),
    "mistral3": ("ministral3", "mistral"),
    "llama4": ("llama4_text",),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}
WHOLES = [(whole, text) for whole, texts in TEXTS.items() for text in texts]
RENAMED = [("gemma3", "gemma3_text"), ("mistral3", "ministral3")]  # those that had other names once


def wrapper(model_type: str, text_type: str = "") -> PreTrainedModel:
    """A random network that sees, with a text model of a few layers; the tying is the whole model's."""
    torch.manual_seed(0)
    text = (CONFIGS | MIXTURES)[text_type or TEXTS[model_type][0]](len(TOKENIZER), 128)
    seeing, sizes, options = SEEING[model_type]
    eyes = {"model_type": seeing, **VISION, **sizes}
    config = AutoConfig.for_model(model_type, text_config=text.to_dict(), vision_config=eyes, **options)
    return AutoModelForImageTextToText.from_config(config).eval()


def saved(network: PreTrainedModel, directory: Path, names: str = "") -> Path:
    """Its checkpoint, with the parameters under names of a time, by default those that the library saves."""
    network.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    if not names:  # those of the library
        return directory
    weights = load_file(directory / "model.safetensors")
    given = {network_name(name): weight for name, weight in weights.items()}
    save_file({NAMES[names](name): tensor for name, tensor in given.items()}, directory / "model.safetensors")
    return directory


def network_name(name: str) -> str:
    """The name in memory of what the library saves under one of its older names."""
    name = name.replace("language_model.model.", TEXT_PREFIX) if name.startswith("language_model.") else name
    return name.removeprefix("language_model.")


@pytest.mark.parametrize(("model_type", "text_type"), WHOLES)
def test_the_text_part_of_a_checkpoint_has_the_logits_of_the_whole_network(model_type, text_type, tmp_path):
    network = wrapper(model_type, text_type)
    check_logits(network, saved(network, tmp_path))


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(("model_type", "text_type"), RENAMED)
def test_the_text_part_is_found_under_the_names_of_every_time(model_type, text_type, names, tmp_path):
    network = wrapper(model_type, text_type)
    check_logits(network, saved(network, tmp_path, names))


def check_logits(network: PreTrainedModel, directory: Path) -> None:
    """The text model of the checkpoint, loaded by the map and by the library, against the whole network."""
    model = load(directory, "cpu")
    tokens = torch.arange(3, 12)[None]
    params = model.params(directory)
    with torch.no_grad():
        expected = network(input_ids=tokens).logits
        computed = model.with_weights(model.hold(params))(input_ids=tokens).logits
        trained = load_network(directory)(input_ids=tokens).logits
    assert_close(computed, expected, rtol=1e-5, atol=1e-5)
    assert_close(trained, expected, rtol=1e-5, atol=1e-5)
    assert model.architecture == architecture_of(network.config)
    assert not any("vision" in name or "visual" in name for name in params)


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "llama4", "qwen3_5"])
def test_a_network_that_sees_has_the_text_weights_of_its_checkpoint(model_type, tmp_path):
    network = wrapper(model_type)
    architecture = architecture_of(network.config)
    stored = source_of(saved(network, tmp_path), "before").params(architecture)
    params = source_of(network, "after").params(architecture, stored)
    assert set(params) == set(stored)
    assert all(update_of(matrix, params, stored).norm == 0 for matrix in architecture.matrices)


def test_the_tying_is_that_of_the_whole_model():
    text = CONFIGS["ministral3"](50, 16)
    config = Mistral3Config(text_config=text, tie_word_embeddings=True)
    assert not text.tie_word_embeddings
    assert text_part(config).tie_word_embeddings and architecture_of(config).tied


def test_the_text_part_is_trained(tmp_path):
    start = saved(wrapper("gemma3"), tmp_path / "start", "as saved")
    log = small.Curves()
    arguments = {"name": "text", "seed": 0, "device": "cpu", "log_metrics": log, "start": start}
    examples = small.WORLD.examples()
    fit(DPO(), load_network(start), TOKENIZER, examples, small.TRAINING, tmp_path / "training", **arguments)
    model = load(start, "cpu")
    before, after = model.params(start), model.params(tmp_path / "training/step-2")
    assert all(update_of(matrix, after, before).norm > 0 for matrix in model.architecture.matrices)
