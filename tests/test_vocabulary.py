import json
import logging
from pathlib import Path

import pytest
import torch
from networks import save
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from weightgeom.model import load, load_architecture
from weightgeom.pretrained import TwoCheckpoints
from weightgeom.vocabulary import aligned
from weightgeom.weights import difference, open_params

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def changed(directory: Path, target: Path, **config: object) -> dict[str, torch.Tensor]:
    """Copy a checkpoint, with another config; its weights, to be changed and saved."""
    target.mkdir()
    for path in directory.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stored | config))
    return load_file(directory / "model.safetensors")


def resized(directory: Path, target: Path, by: int) -> Path:
    """A checkpoint with `by` more rows of embeddings than another (fewer, if negative), all else moved."""
    weights = changed(directory, target)
    for name, weight in weights.items():
        rows = len(weight) + by if name in (EMBED, HEAD) else len(weight)
        weight = torch.cat([weight, torch.full((max(0, by), *weight.shape[1:]), 7.0)])[:rows]
        weights[name] = weight + 0.5
    vocabulary = len(weights[EMBED])
    config = json.loads((target / "config.json").read_text()) | {"vocab_size": vocabulary}
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors")
    return target


@pytest.mark.parametrize("by", [3, -3])
def test_the_shared_rows_of_resized_embeddings_are_compared_and_the_log_says_so(tmp_path, caplog, by):
    before = save("llama", tmp_path / "before")
    after = resized(before, tmp_path / "after", by)
    with caplog.at_level(logging.WARNING):
        TwoCheckpoints(str(before), str(after)).check(None)
    model = load(before, "cpu")
    start = model.params(before)
    update = difference(model.params(after, start), start)
    rows = len(start[EMBED])
    shared = min(rows, rows + by)
    for name in (EMBED, HEAD):
        assert (
            f"{after} has {rows + by} rows of {name} and its base {rows}: the {shared} shared" in caplog.text
        )
        assert_close(update[name][:shared], torch.full((shared, 32), 0.5), rtol=0, atol=1e-6)
        assert_close(update[name][shared:], torch.zeros(rows - shared, 32))
    assert ("the 3 that it lacks are taken as unmoved" in caplog.text) == (by < 0)
    assert_close(update[Q], torch.full((24, 32), 0.5), rtol=0, atol=1e-6)


def test_an_untied_base_finds_the_embedding_of_a_tied_checkpoint_as_its_unembedding(tmp_path):
    before = save("llama", tmp_path / "before")
    weights = changed(before, tmp_path / "after", tie_word_embeddings=True)
    del weights[HEAD]
    save_file(weights, tmp_path / "after" / "model.safetensors")
    TwoCheckpoints(str(before), str(tmp_path / "after")).check(None)
    model = load(before, "cpu")
    after = model.params(tmp_path / "after", model.params(before))
    assert_close(after[HEAD], after[EMBED], rtol=0, atol=0)
    assert set(after) == set(model.params(before))


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_base_takes_no_other_unembedding_than_its_own(tmp_path, equal):
    before = save("llama_tied", tmp_path / "before")
    weights = changed(before, tmp_path / "after")
    weights[HEAD] = weights[EMBED] + (0 if equal else 1)
    save_file(weights, tmp_path / "after" / "model.safetensors")
    pair = TwoCheckpoints(str(before), str(tmp_path / "after"))
    if equal:
        assert pair.check(None).tied
        return
    with pytest.raises(ValueError, match=r"after has an unembedding of its own and its base unembeds with"):
        pair.check(None)


def test_equal_vocabularies_are_left_alone(tmp_path):
    before = save("llama", tmp_path / "before")
    architecture = load_architecture(before)
    params = open_params(before, architecture)
    assert aligned(params, params, architecture, before) is params
