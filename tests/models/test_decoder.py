from dataclasses import replace

from transformers import GPT2Config, LlamaConfig

from weightgeom.models.decoder import LLAMA, Names, decoder, head_size, kv_heads
from weightgeom.models.residual import Norm, ResidualMatrix, Rows, Site

CONFIG = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)


def test_the_defaults_are_llamas_names():
    architecture = decoder(CONFIG)
    expected = [
        ("q", "model.layers.0.self_attn.q_proj", 4),
        ("k", "model.layers.0.self_attn.k_proj", 2),
        ("v", "model.layers.0.self_attn.v_proj", 2),
        ("gate", "model.layers.0.mlp.gate_proj", 1),
        ("up", "model.layers.0.mlp.up_proj", 1),
        ("o", "model.layers.0.self_attn.o_proj", 4),
        ("down", "model.layers.0.mlp.down_proj", 1),
    ]
    assert architecture.matrices == tuple(ResidualMatrix(0, *entry) for entry in expected)  # pyright: ignore
    assert architecture.embed == "model.embed_tokens.weight" and architecture.unembed == "lm_head.weight"
    assert (
        architecture.final_norm == Norm("model.norm.weight")
        and not architecture.parallel
        and not architecture.tied
    )
    assert (
        architecture.d_model,
        architecture.n_layers,
        architecture.n_heads,
        architecture.n_kv_heads,
        architecture.d_head,
    ) == (8, 1, 4, 2, 2)


def test_a_decoder_without_a_gate_reads_its_mlp_input_at_up():
    names = Names(layers="h", gate=None, up="fc1", down="fc2")
    architecture = decoder(CONFIG, names)
    assert [matrix.kind for matrix in architecture.matrices] == ["q", "k", "v", "up", "o", "down"]
    assert architecture.sites == (
        Site(0, "attention_input", "h.0.self_attn.q_proj"),
        Site(0, "mlp_input", "h.0.fc1"),
    )


def test_norms_behind_o_and_down_and_the_final_one_share_the_offset():
    architecture = decoder(CONFIG, replace(LLAMA, attention_norm="n1", mlp_norm="n2"), norm_offset=1.0)
    norms = {matrix.kind: matrix.norm for matrix in architecture.matrices if matrix.norm is not None}
    assert norms == {
        "o": Norm("model.layers.0.n1.weight", 1.0),
        "down": Norm("model.layers.0.n2.weight", 1.0),
    }
    assert architecture.final_norm.offset == 1.0


def test_rows_are_those_of_the_kind_that_they_are_given_for():
    rows = Rows(1, 24, 8, 8)
    architecture = decoder(CONFIG, replace(LLAMA, k="qkv"), rows={"k": rows}, transposed=True)
    assert {matrix.kind: matrix.rows for matrix in architecture.matrices if matrix.rows is not None} == {
        "k": rows
    }
    assert all(matrix.transposed for matrix in architecture.matrices)


def test_without_names_for_them_heads_are_as_wide_and_groups_as_many_as_they_are_by_default():
    config = GPT2Config(n_embd=12, n_head=3)
    assert head_size(config) == 4 and kv_heads(config) == 3
    assert head_size(LlamaConfig(hidden_size=8, num_attention_heads=4, head_dim=6)) == 6
