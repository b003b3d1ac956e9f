"""Checkpoints that cannot be right are refused in one sentence, at once."""

import json
import logging
from pathlib import Path
from typing import Any

import llamas
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from weightgeom.bases.pretrained import Pretrained, TwoCheckpoints
from weightgeom.models.loading import check_vocabulary, load, load_architecture, load_network, load_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return llamas.saved(llamas.llama(0), tmp_path / "model")


def configured(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 10**8}, r"100000000 layers of 1 experts each are more than 4096 layers"),
        ({"num_hidden_layers": 4000, "num_experts": 10**6}, "4000 layers of 1000000 experts"),
        ({"n_positions": 10**9}, "1000000000 positions are more than"),
        ({"hidden_size": -1}, ""),
        ({"hidden_size": "32"}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"num_hidden_layers": 2.5}, ""),
        ({"num_key_value_heads": "2"}, ""),
        ({"model_type": ["llama"]}, ""),
        ({"vocab_size": None}, ""),
    ],
)
def test_a_config_of_impossible_sizes_is_refused(directory: Path, changes: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=rf"config\.json cannot be used: .*{reason}") as refused:
        load_architecture(configured(directory, **changes))
        load(directory, "cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"a": 1', "[" * 10**5, '"text"', "\x00", "version https://git-lfs"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_malformed_json_is_refused_in_a_sentence_that_names_its_place(directory: Path, name: str, text: str):
    (directory / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=str(directory)) as refused:
        load(directory, "cpu")
    assert "\n" not in str(refused.value)


def test_weights_of_other_shapes_than_the_configs_are_refused(directory: Path):
    configured(directory, intermediate_size=24)
    message = (
        r"mlp\.\w+\.weight of .* is of shape \(.*\), and its config's network has it of shape \(.*\): save"
    )
    with pytest.raises(ValueError, match=message):
        load(directory, "cpu")


def test_prefixes_of_wrappers_are_passed_over_when_a_network_is_trained(directory: Path):
    expected = load_network(directory).state_dict()
    path = directory / "model.safetensors"
    save_file({f"_orig_mod.{name}": weight for name, weight in load_file(path).items()}, path)
    network = load_network(directory)
    assert_close(network.state_dict(), expected, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_merged_checkpoint_that_kept_its_adapters_config_is_loaded_as_it_is(directory: Path):
    expected = load_network(directory).state_dict()
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere/at-all"}')
    assert_close(load_network(directory).state_dict(), expected, rtol=0, atol=0)


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_anything_runs(directory: Path):
    tokenizer = load_tokenizer(directory)
    tokens = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)
    message = f"has {tokens + 1} tokens and the model {tokens} embeddings: give the tokenizer that"
    with pytest.raises(ValueError, match=message):
        Pretrained(str(directory)).check(16)
    with pytest.raises(ValueError, match=message):
        TwoCheckpoints(str(directory), str(directory)).check(None)
    with pytest.raises(ValueError, match=message):
        load(directory, "cpu")


def test_tokens_for_images_need_no_embedding_and_a_small_tokenizer_is_named(caplog: pytest.LogCaptureFixture):
    tokenizer = load_tokenizer_of_world()
    tokens = len(tokenizer)
    tokenizer.add_tokens(["<image_soft_token>"])
    check_vocabulary(tokenizer, tokens)
    with caplog.at_level(logging.WARNING):
        check_vocabulary(tokenizer, 3 * tokens)
    assert f"the tokenizer has {tokens + 1} tokens and the model {3 * tokens} embeddings" in caplog.text


def load_tokenizer_of_world() -> Any:
    return small.WORLD.tokenizer()


def test_a_pair_with_two_vocabularies_is_named_in_a_warning(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    after = llamas.saved(llamas.llama(1), tmp_path / "after")
    with caplog.at_level(logging.WARNING):
        TwoCheckpoints(str(directory), str(after)).check(None)
        assert not caplog.text
        path = after / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        numbers = list(vocabulary.values())
        content["model"]["vocab"] = dict(zip(vocabulary, numbers[:4] + numbers[:3:-1], strict=True))
        path.write_text(json.dumps(content))
        TwoCheckpoints(str(directory), str(after)).check(None)
    assert (
        "token numbers mean other tokens" in caplog.text and f"in {after} than in {directory}" in caplog.text
    )


def test_a_pair_whose_networks_compute_differently_is_named_in_a_warning(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    after = llamas.saved(llamas.llama(1), tmp_path / "after")
    config = json.loads((after / "config.json").read_text())
    epsilon = config["rms_norm_eps"]
    for value in (epsilon * (1 + 1e-7), 0.5):  # the first is the same in another file format
        assert not caplog.text
        (after / "config.json").write_text(json.dumps(config | {"rms_norm_eps": value}))
        TwoCheckpoints(str(directory), str(after)).check(None)
    assert f"differ (rms_norm_eps is {epsilon} and 0.5)" in caplog.text


def test_a_state_dict_of_a_training_is_refused_with_the_way_to_convert_it(directory: Path, tmp_path: Path):
    path = tmp_path / "model.pt"
    torch.save(llamas.llama(1).state_dict(), path)
    with pytest.raises(
        FileNotFoundError, match=r"model\.pt is a file, not a .*: load its state dict into its"
    ):
        TwoCheckpoints(str(directory), str(path)).check(None)
    with pytest.raises(FileNotFoundError, match=rf"is a file, not a .*: give its directory, {directory}"):
        Pretrained(str(directory / "model.safetensors")).check(16)
    (directory / "model.safetensors").unlink()
    path.rename(directory / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"only model\.pt: load its state dict into its network"):
        load(directory, "cpu")
