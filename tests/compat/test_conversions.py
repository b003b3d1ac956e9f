"""The door fails with the name that a new version of transformers has moved."""

import pytest

from weightgeom.compat.conversions import renaming


@pytest.mark.parametrize(
    ("model_type", "stored", "in_memory"),
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),  # by the class of the network
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("llama", "embed_out.weight", "embed_out.weight"),  # no entry at all
        ("no such type", "lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_on_disk_are_those_in_memory(model_type, stored, in_memory):
    assert renaming(model_type)(stored) == in_memory
