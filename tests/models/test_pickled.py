import json
import logging
import pickle
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import small
import torch
from networks import save
from safetensors.torch import load_file
from stages import made
from torch.testing import assert_close

from weightgeom.bases.pretrained import Pretrained, TwoCheckpoints
from weightgeom.models.loading import load
from weightgeom.models.pickled import convert, is_pickled

EXAMPLES = small.WORLD.examples()


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return (print, ("evil",))


def pickled(directory: Path, shards: int = 1, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with pickled weights, and these."""
    save("llama_tied", directory, seed)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    mask = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    names = sorted(weights)
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        if (embed := "model.embed_tokens.weight") in part:
            part["lm_head.weight"] = part[embed]  # tied: one memory
        end = "" if shards == 1 else f"-{shard + 1:05d}-of-{shards:05d}"
        torch.save(part | mask, directory / f"pytorch_model{end}.bin")
    return directory, weights


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_converted_to_what_loads(tmp_path, shards):
    source, weights = pickled(tmp_path / "source", shards)
    assert is_pickled(source)
    (target := tmp_path / "target").mkdir()
    convert(source, target)
    params = load(target, "cpu").params(target)
    for name, weight in weights.items():
        assert_close(params[name], weight, rtol=0, atol=0)
    assert_close(params["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert not [name for name in params if "inv_freq" in name] and not is_pickled(target)


def indexed(source: Path, weights: Collection[str], shard: str) -> None:
    """Write an index that has all weights in one shard."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_pickle_of_an_older_save_is_refused_or_passed_over(tmp_path):
    source, weights = pickled(tmp_path / "source")
    shard = "pytorch_model-00001-of-00001.bin"
    torch.save({name: weight + 1 for name, weight in weights.items()}, source / shard)
    (target := tmp_path / "target").mkdir()
    with pytest.raises(
        ValueError, match=r"twice, in pytorch_model\.bin and in another of its 2 pickled files"
    ):
        convert(source, target)
    indexed(source, weights, shard)
    with pytest.raises(ValueError, match=r"holds the weights twice, in pytorch_model\.bin and in the shards"):
        convert(source, target)
    (source / "pytorch_model.bin").rename(source / "pytorch_model-00002-of-00002.bin")
    convert(source, target)
    for name, weight in load_file(target / "model-00001-of-00001.safetensors").items():
        assert_close(weight, weights[name] + 1, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        (
            "pytorch_model-00002-of-00002.bin",
            FileNotFoundError,
            "names pytorch_model-00002-of-00002.bin, which",
        ),
        ("../pytorch_model.bin", FileNotFoundError, r"names \.\./pytorch_model\.bin, which is missing"),
        ("/etc/passwd", ValueError, "is truncated or corrupt"),
    ],
)
def test_an_index_of_pickles_that_are_not_there_is_refused(tmp_path, shard, error, message):
    source, weights = pickled(tmp_path / "source", shards=3)
    indexed(source, weights, shard)
    with pytest.raises(error, match=message):
        convert(source, tmp_path)


def test_only_on_request_and_once(tmp_path, caplog):
    before, after = pickled(tmp_path / "a")[0], pickled(tmp_path / "b", seed=1)[0]
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin: safetensors is required, so save"):
        TwoCheckpoints(str(before), str(after)).check(None)
    pair = TwoCheckpoints(str(before), str(after), allow_bin=True)
    assert pair.check(None).d_model == 32
    with caplog.at_level(logging.INFO):
        base = [pair.prepare(made(tmp_path), EXAMPLES, small.WORLD, "cpu") for _ in range(2)][1]
    assert caplog.text.count("is written as safetensors") == 2  # of each one
    assert base.trajectory is not None
    assert all(tmp_path / "converted" in path.parents for path in base.trajectory.steps.values())
    single = Pretrained(str(before), allow_bin=True)
    assert single.prepare(made(tmp_path), EXAMPLES, small.WORLD, "cpu").directory == base.directory


def test_a_pickled_adapter_is_converted(tmp_path):
    (source := tmp_path / "adapter").mkdir()
    factors = {"base_model.model.q.lora_A.weight": torch.ones(2, 3)}
    torch.save(factors, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text("{}")
    assert is_pickled(source)
    (target := tmp_path / "target").mkdir()
    convert(source, target)
    assert_close(load_file(target / "adapter_model.safetensors"), factors)
    assert (target / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "content", [{"step": 3, "model": {}}, [torch.ones(2)], {"state_dict": {"w": torch.ones(2)}}]
)
def test_a_training_state_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds more than a state dict of tensors: save network\.state"):
        convert(tmp_path, tmp_path)


def test_a_pickle_of_more_than_tensors_is_refused_and_does_not_run(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"model\.bin cannot be read as tensors alone \(Weights only"):
        convert(tmp_path, tmp_path)
    assert "evil" not in capsys.readouterr().out
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as tensors alone"):
        convert(tmp_path, tmp_path)
