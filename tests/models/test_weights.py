import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import ApertusConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

from weightgeom.models.residual import architecture_of
from weightgeom.models.weights import Stored, difference, open_params

LLAMA = architecture_of(LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
Q = "model.layers.0.self_attn.q_proj.weight"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture
def params(generator):
    return {
        Q: torch.randn(8, 8, generator=generator),
        EMBED: torch.randn(5, 8, generator=generator),
        NORM: torch.randn(8, generator=generator),
    }


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def directory(tmp_path, params):
    save_file(params, tmp_path / "model.safetensors")
    return tmp_path


def save_sharded(params, directory):
    names = [f"model-{i:05d}-of-{len(params):05d}.safetensors" for i in range(1, len(params) + 1)]
    for file, (name, tensor) in zip(names, params.items(), strict=True):
        save_file({name: tensor}, directory / file)
    index = {"metadata": {}, "weight_map": dict(zip(params, names, strict=True))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_a_single_file_gives_back_what_was_saved(directory, params):
    assert_close(dict(open_params(directory, LLAMA)), params, rtol=0, atol=0)


def test_a_sharded_checkpoint_gives_back_what_was_saved(tmp_path, params):
    save_sharded(params, tmp_path)
    assert_close(dict(open_params(tmp_path, LLAMA)), params, rtol=0, atol=0)


def test_a_checkpoint_has_the_names_and_number_of_what_was_saved(directory, params):
    stored = open_params(directory, LLAMA)
    assert len(stored) == 3 and Q in stored and "absent" not in stored


def test_a_tied_checkpoint_unembeds_with_its_embedding(directory, params):
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config.tie_word_embeddings = True
    architecture = architecture_of(config)
    unembedding = architecture.unembedding(open_params(directory, architecture))
    assert_close(unembedding, params[EMBED], rtol=0, atol=0)


def test_the_unembedding_of_gpt_neox_gets_its_name_in_memory(tmp_path):
    save_file(
        {"embed_out.weight": torch.ones(5, 8), "gpt_neox.embed_in.weight": torch.zeros(5, 8)},
        tmp_path / "model.safetensors",
    )
    stored = open_params(tmp_path, architecture_of(GPTNeoXConfig(num_hidden_layers=1)))
    assert set(stored) == {"lm_head.weight", "gpt_neox.embed_in.weight"}
    assert_close(stored["lm_head.weight"], torch.ones(5, 8))


def test_a_checkpoint_of_the_base_model_gets_its_prefix(tmp_path):
    stored = {"h.0.attn.c_attn.weight": torch.ones(8, 24), "wte.weight": torch.zeros(5, 8)}
    save_file(stored, tmp_path / "model.safetensors")
    names = set(open_params(tmp_path, architecture_of(GPT2Config(n_layer=1))))
    assert names == {"transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"}


def test_a_prefix_is_not_put_before_the_unembedding(tmp_path):
    save_file(
        {"wte.weight": torch.zeros(5, 8), "lm_head.weight": torch.ones(5, 8)},
        tmp_path / "model.safetensors",
    )
    names = set(open_params(tmp_path, architecture_of(GPT2Config(n_layer=1))))
    assert names == {"transformer.wte.weight", "lm_head.weight"}


def test_masks_and_rotary_frequencies_are_not_parameters(tmp_path):
    kept = {"h.0.attn.c_attn.bias": torch.ones(24), "wte.weight": torch.zeros(5, 8)}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    rotary = {"h.0.attention.rotary_emb.inv_freq": torch.ones(2)}
    save_file(kept | masks | rotary, tmp_path / "model.safetensors")
    stored = open_params(tmp_path, architecture_of(GPT2Config(n_layer=1)))
    assert set(stored) == {"transformer.h.0.attn.c_attn.bias", "transformer.wte.weight"}


def test_the_constants_of_the_activation_of_apertus_are_no_parameters(tmp_path):
    constants = {f"model.layers.0.mlp.act_fn.{name}": torch.ones(1) for name in ("alpha_p", "beta", "eps")}
    save_file({EMBED: torch.zeros(5, 8), **constants}, tmp_path / "model.safetensors")
    apertus = ApertusConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    stored = open_params(tmp_path, architecture_of(apertus))
    assert set(stored) == {EMBED, "model.layers.0.mlp.act_fn.alpha_p"}


def test_the_difference_of_two_dtypes_is_taken_in_float32(tmp_path, directory, params):
    after = {name: (tensor + 1).bfloat16() for name, tensor in params.items()}
    update = difference(after, open_params(directory, LLAMA))
    for name, tensor in params.items():
        assert update[name].dtype == torch.float32
        assert_close(update[name], after[name].float() - tensor, rtol=0, atol=0)
    assert len(update) == 3 and set(update) == set(params)
    assert Q in update and "absent" not in update


def test_the_difference_of_two_bfloat16_models_is_not_rounded_to_bfloat16():
    # 1 - 2⁻¹² · 1.5 has 13 significant bits, bfloat16 keeps 8
    after, before = torch.tensor([1.0]).bfloat16(), torch.tensor([1.5 * 2**-12]).bfloat16()
    update = difference({"w": after}, {"w": before})
    assert_close(update["w"], torch.tensor([1 - 1.5 * 2**-12]), rtol=0, atol=0)


def test_the_difference_of_two_checkpoints_reads_no_tensor_before_it_is_asked_for(directory, monkeypatch):
    read = []
    get = Stored.__getitem__
    stored = open_params(directory, LLAMA)
    monkeypatch.setattr(Stored, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    update = difference(stored, stored)
    assert set(read) <= {next(iter(stored))}  # one item of a mapping: the run-time type checker
    read.clear()
    assert_close(update[NORM], torch.zeros(8))
    assert read == [NORM, NORM]


def test_a_difference_of_unequal_shapes_is_refused_with_both(directory, params):
    after = params | {Q: torch.zeros(4, 8), NORM: torch.zeros(4)}
    shapes = r"of shape \(4, 8\) after and of shape \(8, 8\) before"
    message = rf"{Q} is {shapes}, and 1 more parameters differ"
    with pytest.raises(ValueError, match=message):
        difference(after, open_params(directory, LLAMA))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_difference_with_a_parameter_on_one_side_only_is_refused(directory, params, swapped):
    stored, larger = open_params(directory, LLAMA), params | {HEAD: torch.zeros(5, 8)}
    sides = r"of shape \(5, 8\) after and absent" if not swapped else r"absent after and of shape"
    with pytest.raises(ValueError, match=f"{HEAD} is {sides}"):
        difference(*((stored, larger) if swapped else (larger, stored)))


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint directory .*nowhere"):
        open_params(tmp_path / "nowhere", LLAMA)


def test_a_directory_without_weights_is_refused(tmp_path):
    message = r"no model\.safetensors or model\.safetensors\.index\.json in .*\d$"
    with pytest.raises(FileNotFoundError, match=message):
        open_params(tmp_path, LLAMA)


def test_a_directory_with_pickled_weights_only_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin: safetensors is required"):
        open_params(tmp_path, LLAMA)


def test_a_missing_shard_is_refused_by_name(tmp_path, params):
    names = save_sharded(params, tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"index\.json names {names[1]}, which is missing"):
        open_params(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/other.safetensors", "a/../../other.safetensors"]
)
def test_an_index_that_leads_outside_its_checkpoint_is_refused(tmp_path, params, shard):
    (inside := tmp_path / "checkpoint").mkdir()
    save_file(params, tmp_path / "other.safetensors")
    (inside / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(params, shard)})
    )
    with pytest.raises(ValueError, match=rf"names {shard}, which lies outside {inside}: download it again"):
        open_params(inside, LLAMA)


def test_an_index_that_leads_outside_through_a_linked_folder_is_refused(tmp_path, params):
    (inside := tmp_path / "checkpoint").mkdir()
    (tmp_path / "other").mkdir()
    save_file(params, tmp_path / "other/a.safetensors")
    (inside / "shards").symlink_to(tmp_path / "other")
    (inside / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(params, "shards/a.safetensors")})
    )
    with pytest.raises(ValueError, match=r"names shards/a\.safetensors, which lies outside"):
        open_params(inside, LLAMA)


def test_shards_that_are_links_are_read_and_a_link_to_nothing_is_named(tmp_path, params):
    (cache := tmp_path / "snapshot").mkdir()
    for name in save_sharded(params, tmp_path):
        (cache / name).symlink_to(tmp_path / name)
    (cache / "model.safetensors.index.json").symlink_to(tmp_path / "model.safetensors.index.json")
    assert_close(dict(open_params(cache, LLAMA)), params, rtol=0, atol=0)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs/nothing")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"is a link to .*nothing, which is missing; download it again"
    ):
        open_params(tmp_path, LLAMA)


def test_an_index_of_other_shards_is_refused(tmp_path, params):
    names = save_sharded(params, tmp_path)
    save_file({HEAD: torch.ones(5, 8)}, tmp_path / names[0])
    with pytest.raises(ValueError, match=rf"index\.json is not that of its shards: it has {Q} in {names[0]}"):
        open_params(tmp_path, LLAMA)


def test_a_single_file_beside_shards_is_refused(directory, params):
    save_sharded(params, directory)
    with pytest.raises(
        ValueError, match=r"holds the weights twice, in model\.safetensors and in the shards of"
    ):
        open_params(directory, LLAMA)


def test_shards_without_an_index_beside_a_single_file_are_named_in_a_warning(directory, params, caplog):
    save_sharded(params, directory)
    (directory / "model.safetensors.index.json").unlink()
    assert set(open_params(directory, LLAMA)) == set(params)
    assert re.search(r"holds shards such as model-\S+ without an index, which are not read", caplog.text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", r", only model\.fp16\.safetensors: if it has .* rename it to model\.safe"),
        (
            "consolidated.safetensors",
            r", only consolidated\.safetensors: if it has the names of transformers'",
        ),
        ("zero_to_fp32.py", r"only parts of DeepSpeed: join them with python zero_to_fp32\.py"),
        ("pytorch_model_fsdp_0/__0_0.distcp", r"only parts of FSDP: join them with accelerate merge-weights"),
    ],
)
def test_weights_under_another_name_or_in_parts_are_named(tmp_path, name, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=message):
        open_params(tmp_path, LLAMA)


def test_names_under_an_unknown_prefix_are_refused_as_they_are_in_the_file(directory, params):
    save_file({f"policy.{name}": weight for name, weight in params.items()}, directory / "model.safetensors")
    with pytest.raises(
        ValueError, match=r" holds policy\.\S+, and no model\.embed_tokens\.weight: its names"
    ):
        open_params(directory, LLAMA)


def test_a_pointer_of_git_lfs_is_named(directory):
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(
        ValueError, match=rf"is a pointer of git-lfs, not the file: run git lfs pull in {directory}"
    ):
        open_params(directory, LLAMA)


def test_folders_with_checkpoints_are_named_the_last_of_a_training_first(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"only in folders of it: give .*checkpoint-10$"):
        open_params(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: f"language_model.{name}",
        lambda name: f"base_model.model.{name}",
    ],
)
def test_prefixes_of_wrappers_are_passed_over(tmp_path, params, wrapped):
    params |= {HEAD: torch.ones(5, 8)}
    inside = {wrapped(name): tensor for name, tensor in params.items()}
    vision = (
        {"model.visual.proj.weight": torch.ones(3, 3)} if any("language" in name for name in inside) else {}
    )
    save_file(inside | vision, tmp_path / "model.safetensors")
    assert_close(dict(open_params(tmp_path, LLAMA)), params, rtol=0, atol=0)


def test_one_parameter_under_two_names_is_refused(tmp_path, params):
    save_file(params | {f"module.{Q}": params[Q] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"holds {Q} twice, as .*{Q} and as .*{Q}: remove one of them"):
        open_params(tmp_path, LLAMA)


def test_factors_beside_their_base_are_refused(tmp_path, params):
    key = f"base_model.model.{Q.removesuffix('.weight')}.lora_A.default.weight"
    save_file(params | {key: torch.ones(2, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"holds {key} as well as the weights of its base: merge the adapter"
    ):
        open_params(tmp_path, LLAMA)


@pytest.mark.parametrize("kept", [0, 4, 50, -3])
def test_a_truncated_file_is_refused(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = r"model\.safetensors is truncated or corrupt; copy or download it again"
    with pytest.raises(ValueError, match=message):
        open_params(directory, LLAMA)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"weight_map": {"a"',
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "[" * 10**5,
    ],
)
def test_a_corrupt_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    message = r"index\.json is truncated or corrupt; copy or download it again"
    with pytest.raises(ValueError, match=message):
        open_params(tmp_path, LLAMA)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_pages_of_a_tensor_leave_the_memory_with_it(tmp_path):
    def mapped():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1024

    save_file({Q: torch.ones(4096, 4096)}, tmp_path / "model.safetensors")  # 64 MiB
    stored = open_params(tmp_path, LLAMA)
    start = mapped()
    tensor = stored[Q]
    tensor.sum()
    assert mapped() - start > 60
    del tensor
    assert mapped() - start < 4
