import logging

import pytest
import torch
from networks import save
from safetensors.torch import save_file
from stored import EMBED, HEAD, changed, resized
from torch.testing import assert_close

from weightgeom.bases.pretrained import TwoCheckpoints
from weightgeom.models.loading import load, load_architecture
from weightgeom.models.vocabulary import aligned
from weightgeom.models.weights import difference, open_params

Q = "model.layers.0.self_attn.q_proj.weight"


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
