import pytest
import torch
from moving import matrix_of
from networks import language_model
from torch.testing import assert_close
from transformers.utils.logging import disable_progress_bar

from weightgeom.causal.directions import haar
from weightgeom.causal.edits import RankOne, change_norm
from weightgeom.models.loading import load_network
from weightgeom.text.tokens import packed

ALPHA = 0.7


def by_hand(network, kind, state, u, v):
    """The state dict with α u vᵀ added to a matrix of layer 1, from how each family stores it."""
    change = (ALPHA * torch.outer(u, v)).float()
    if network == "gpt_neox":
        name = {
            "o": "gpt_neox.layers.1.attention.dense.weight",
            "up": "gpt_neox.layers.1.mlp.dense_h_to_4h.weight",
        }.get(kind, "gpt_neox.layers.1.attention.query_key_value.weight")
        # Four heads, each with the 8 rows of its q, its k and its v.
        rows = torch.arange(96).view(4, 3, 8)[:, "qkv".find(kind)].flatten() if kind in "qkv" else slice(None)
        state[name][rows] += change
    elif network == "gpt2":
        name = {"o": "transformer.h.1.attn.c_proj.weight", "up": "transformer.h.1.mlp.c_fc.weight"}.get(
            kind, "transformer.h.1.attn.c_attn.weight"
        )
        start = 32 * "qkv".find(kind)  # thirds of the columns, as stored transposed
        columns = slice(start, start + 32) if kind in "qkv" else slice(None)
        state[name][:, columns] += change.T
    elif network == "phi3":
        block = "model.layers.1"
        if kind in "qkv":  # 32 / 4 = 8 a head: 4 heads of q, then 2 of k, then 2 of v
            start = {"q": 0, "k": len(u) * 2, "v": len(u) * 3}[kind]
            state[f"{block}.self_attn.qkv_proj.weight"][start : start + len(u)] += change
        elif kind == "up":  # behind the gate
            state[f"{block}.mlp.gate_up_proj.weight"][len(u) :] += change
        else:
            state[f"{block}.self_attn.o_proj.weight"] += change
    else:
        place = {"o": "self_attn.o_proj", "up": "mlp.up_proj"}.get(kind, f"self_attn.{kind}_proj")
        state[f"model.layers.1.{place}.weight"] += change
    return state


@pytest.mark.parametrize("kind", ["q", "k", "v", "o", "up"])
@pytest.mark.parametrize("network", ["gpt_neox", "gpt2", "phi3", "llama_tied", "gemma2"])
def test_the_edited_model_is_one_built_by_hand_from_an_edited_state_dict(
    network, kind, tokenizer, examples, tmp_path
):
    disable_progress_bar()
    model, params = language_model(network, tokenizer)
    before = {name: weight.clone() for name, weight in params.items()}
    matrix = matrix_of(model, f"L1.{kind}")
    out, into = matrix.of(params).shape
    edit = RankOne(matrix, ALPHA, haar(out, "u"), haar(into, "v"))
    edited = edit.applied(params)

    other = model.with_weights({name: weight.clone() for name, weight in params.items()})
    other.load_state_dict(by_hand(network, kind, other.state_dict(), edit.u, edit.v))
    other.save_pretrained(tmp_path)
    loaded = load_network(tmp_path).eval()
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(edited[name])
    (batch,) = packed(examples.heldout, tokenizer, 16, 64)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        logits = loaded(**given, position_ids=batch.positions(), use_cache=False).logits
    assert torch.equal(model.logits(edited, batch), logits)
    assert not torch.equal(model.logits(params, batch), logits)
    # The weights are untouched, and those that are not edited are shared.
    assert all(weight.equal(before[name]) for name, weight in params.items())
    assert all(edited[name] is weight for name, weight in params.items() if name != edit.matrix.parameter)


def test_the_norm_of_a_change_is_alpha(model, params):
    matrix = matrix_of(model, "L0.down")
    edit = RankOne(matrix, 3.0, haar(32, "u"), haar(48, "v"))
    # ‖α u vᵀ‖_F = |α|
    assert_close(change_norm(edit, params, [matrix]), 3.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["u", "v"])
def test_a_side_that_is_no_unit_vector_is_refused(side, model):
    sides = {"u": haar(32, "u"), "v": haar(32, "v")}
    sides[side] = 2 * sides[side]
    with pytest.raises(ValueError, match=rf"{side} of L0\.k must have norm 1, got 2"):
        RankOne(matrix_of(model, "L0.k"), 1.0, sides["u"], sides["v"])
