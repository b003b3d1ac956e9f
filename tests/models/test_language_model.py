import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from weightgeom.models.language_model import LanguageModel
from weightgeom.models.loading import load, load_architecture, load_network, load_tokenizer
from weightgeom.models.residual import architecture_of
from weightgeom.text.files import first_line
from weightgeom.text.tokens import packed, responses

WEIGHTS = "model.safetensors"


def close(actual, expected):
    # Two orders of the same fp32 sums, over logits of order 10.
    assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def batch(model, examples):
    """Responses of unequal length behind their prompts."""
    ((chosen, _),) = responses(examples.heldout_pairs, model.tokenizer, 64)
    assert (chosen.attention_mask == 0).any()
    return chosen


@pytest.fixture
def directory(model, tmp_path):
    disable_progress_bar()
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def changed(params, generator):
    return {name: value + torch.randn(value.shape, generator=generator) / 9 for name, value in params.items()}


def test_log_probs_are_those_of_a_loop_over_tokens(model, params, batch):
    log_probs = model.log_probs(params, batch)
    assert tuple(log_probs.shape) == (len(batch.input_ids), batch.input_ids.shape[1] - 1)
    expected = torch.zeros_like(log_probs)
    for row, (ids, target) in enumerate(zip(batch.input_ids, batch.target, strict=True)):
        for position in target.nonzero()[:, 0].tolist():
            logits = model.network(input_ids=ids[None, :position]).logits[0, -1].double()
            expected[row, position - 1] = (logits.exp() / logits.exp().sum())[ids[position]].log()
    close(log_probs, expected)
    assert (log_probs == 0).equal(~batch.target[:, 1:])


def test_given_weights_are_used_as_if_loaded_in_place(model, params, batch, generator):
    other = changed(params, generator)
    network = deepcopy(model.network)
    network.load_state_dict(other)
    expected = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    close(model.logits(other, batch), expected)
    assert_close(dict(model.network.named_parameters()), params, rtol=0, atol=0)  # not mutated
    assert (model.logits(other, batch) - model.logits(params, batch)).abs().max() > 0.1


def test_the_last_logits_are_the_end_of_all_logits(model, params, batch):
    close(model.logits(params, batch, keep=2), model.logits(params, batch)[:, -2:])


def test_logits_carry_no_gradient(model, params, batch):
    weights = {name: value.requires_grad_() for name, value in params.items()}
    assert not model.logits(weights, batch).requires_grad
    assert not model.log_probs(weights, batch).requires_grad


def test_held_weights_are_the_parameters_in_fp32(model, params):
    stored = {name: value.to(torch.bfloat16) for name, value in params.items()} | {"buffer": torch.ones(1)}
    held = model.hold(stored)
    assert held.keys() == params.keys()
    assert all(value.dtype == torch.float32 for value in held.values())
    assert_close(held["lm_head.weight"], stored["lm_head.weight"].float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_held_and_given_in_the_dtype_that_is_asked_for(model, params, batch, dtype):
    held = model.hold(params, dtype)
    assert all(value.dtype == dtype for value in held.values())
    network = model.with_weights(params, dtype)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert_close(dict(network.named_parameters()), held, rtol=0, atol=0)
    logits = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.dtype == dtype
    close(logits.float(), model.logits(params, batch))


def test_a_tied_network_unembeds_with_the_embedding_it_is_given(tokenizer, batch):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, architecture_of(config))
    weights = {name: value.detach().clone() for name, value in model.network.named_parameters()}
    embedding = "model.embed_tokens.weight"
    weights[embedding] = 1 + weights[embedding]
    # Old checkpoints also store the tied copy, which says nothing of its own.
    held = model.hold(weights | {"lm_head.weight": weights[embedding]})
    network = deepcopy(model.network)
    network.load_state_dict(weights, strict=False)
    expected = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    close(model.logits(held, batch), expected)


def test_a_saved_model_is_loaded_as_it_was(model, params, batch, directory):
    loaded = load(directory, "cpu")
    assert loaded.architecture == model.architecture and not loaded.network.training
    assert loaded.device == torch.device("cpu")
    assert_close(loaded.hold(loaded.params(directory)), params, rtol=0, atol=0)
    assert all(parameter.is_meta for parameter in loaded.network.parameters())  # no weights of its own
    assert loaded.size == 4 * sum(weight.numel() for weight in params.values())
    text = "question : a sentence ."
    assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert_close(loaded.log_probs(params, batch), model.log_probs(params, batch), rtol=0, atol=0)


def test_a_network_with_given_weights_shares_them_and_not_the_models_network(model, params, batch):
    network = model.with_weights(params)
    assert all(
        parameter.data_ptr() == params[name].data_ptr() for name, parameter in network.named_parameters()
    )
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert_close(network(**given).logits, model.logits(params, batch), rtol=0, atol=0)
    network.forward = None  # as a trainer patches it
    assert model.network.forward is not None


@pytest.mark.parametrize("tied", [False, True])
def test_a_streaming_model_predicts_as_one_that_holds_its_weights(model, tokenizer, batch, tied):
    config = deepcopy(model.network.config)
    config.tie_word_embeddings = tied
    network = type(model.network)(config).eval()
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    assert ("lm_head.weight" in weights) != tied
    whole = LanguageModel(network, tokenizer, architecture_of(config))
    streaming = whole.streaming(weights)
    assert_close(streaming.logits({}, batch), whole.logits(weights, batch), rtol=0, atol=0)
    # Dropped again: the embedding's stand-in is one number.
    left = [parameter for parameter in streaming.network.parameters() if not parameter.is_meta]
    assert [parameter.untyped_storage().nbytes() for parameter in left] == [4]
    assert not any(parameter.is_meta for parameter in whole.network.parameters())


def test_a_model_saved_in_half_precision_is_loaded_in_fp32(model, directory):
    deepcopy(model.network).to(torch.bfloat16).save_pretrained(directory)
    assert load_network(directory).dtype == torch.float32


def test_the_map_is_read_from_the_config_alone(model, directory):
    (directory / WEIGHTS).unlink()
    assert load_architecture(directory) == model.architecture


def test_a_tokenizer_without_padding_pads_with_its_end(model, directory):
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    loaded = load_tokenizer(directory)
    assert loaded.pad_token == loaded.eos_token == "<eos>"
    home, end = loaded.get_vocab()["home"], loaded.eos_token_id
    (batch,) = packed(["home home home home"], loaded, length=3, limit=9)
    assert batch.input_ids.tolist() == [[home] * 3, [home, end, end]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_directory_without_config_is_refused(directory):
    (directory / "config.json").unlink()
    message = r"holds no config\.json: give a transformers checkpoint"
    for place in (directory, directory / "absent"):
        with pytest.raises(FileNotFoundError, match=message):
            load(place, "cpu")


@pytest.mark.parametrize("text", ['{"model_type": "nonesuch"}', '{"model_type": 3}'])
def test_a_config_that_cannot_be_used_is_refused_in_one_line(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json cannot be used: .") as refusal:
        load(directory, "cpu")
    assert "\n" not in str(refusal.value)


def test_a_family_without_a_map_is_refused(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(NotImplementedError, match="no residual-stream map for 'bert'"):
        load(directory, "cpu")


def test_a_directory_without_tokenizer_is_refused(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    message = r"holds no tokenizer \(.*tokenizer\.json.*\): save one next to the weights"
    with pytest.raises(FileNotFoundError, match=message):
        load(directory, "cpu")


def test_a_tokenizer_that_cannot_be_read_is_refused(directory):
    (directory / "tokenizer.json").unlink()
    message = r"holds no tokenizer that can be read \(.+\): save one next to the weights"
    with pytest.raises(FileNotFoundError, match=message):
        load(directory, "cpu")


@pytest.mark.parametrize("content", ["", "[]", "3", "null", '{"a": 1', "[" * 100_000, "\xff\xfe{"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"])
def test_a_damaged_file_of_a_tokenizer_is_named(directory, name, content):
    (directory / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is truncated or corrupt; copy or download it again"):
        load_tokenizer(directory)


def test_a_tokenizer_without_end_token_is_refused(model, directory):
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match=r"has no end token \(eos_token\): set one and save it again"):
        load(directory, "cpu")


def test_truncated_weights_are_refused(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt; copy or download"):
        load(directory, "cpu")


def test_missing_weights_are_refused(directory):
    (directory / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors or model\.safetensors\.index\.json"):
        load(directory, "cpu")


def test_a_missing_parameter_is_refused_and_not_left_random(directory):
    stored = load_file(directory / WEIGHTS)
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    del stored[name]
    save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})
    message = rf"lacks 1 of the network's parameters, the first {name}: save the whole model"
    with pytest.raises(ValueError, match=message):
        load(directory, "cpu")


def test_a_tied_network_stored_without_its_unembedding_lacks_nothing(tmp_path):
    disable_progress_bar()
    config = GPTNeoXConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.tie_word_embeddings = True
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    network = load_network(tmp_path)
    assert network.get_parameter("lm_head.weight") is network.get_parameter("gpt_neox.embed_in.weight")


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n  what was wrong.\nand more")) == "what was wrong"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("it fails:\n\n  as it must.\nand more")) == "it fails: as it must"
