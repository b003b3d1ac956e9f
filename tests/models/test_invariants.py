"""Wrong maps, planted, are found out by the invariants."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from networks import CONFIGS, MIXTURES

from weightgeom.check import failure
from weightgeom.models.invariants import INVARIANTS, queries_act_at_their_token_and_head
from weightgeom.models.residual import Architecture, Kind, Norm, ResidualMatrix, Rows, Site
from weightgeom.models.specimen import Specimen

Map = Architecture
D, HEADS = 32, 4


@cache
def right(name: str) -> Specimen:
    return Specimen.of((CONFIGS | MIXTURES)[name](50, 16))


def each(architecture: Map, change: Callable[[ResidualMatrix], ResidualMatrix]) -> Map:
    """The map with every matrix changed."""
    return replace(architecture, matrices=tuple(map(change, architecture.matrices)))


def swapped(first: Kind, other: Kind) -> Callable[[Map], Map]:
    """The rows of two kinds of a fused weight, exchanged."""

    def wrong(architecture: Map) -> Map:
        rows = {matrix.kind: matrix.rows for matrix in architecture.matrices}
        rows |= {first: rows[other], other: rows[first]}
        return each(architecture, lambda matrix: replace(matrix, rows=rows[matrix.kind]))

    return wrong


def exchanged(first: Kind, other: Kind) -> Callable[[Map], Map]:
    """Two kinds exchanged, wherever they are."""
    names = {first: other, other: first}
    return lambda architecture: each(architecture, lambda m: replace(m, kind=names.get(m.kind, m.kind)))


def fused(rows: dict[str, Rows]) -> Callable[[Map], Map]:
    """Other rows of a fused weight."""
    return lambda architecture: each(
        architecture, lambda matrix: replace(matrix, rows=rows.get(matrix.kind, matrix.rows))
    )


def norms(change: Callable[[Norm], Norm | None]) -> Callable[[Map], Map]:
    """Other norms behind o and down."""
    return lambda architecture: each(
        architecture, lambda m: m if m.norm is None else replace(m, norm=change(m.norm))
    )


def of_kinds(*kinds: Kind, **changes: object) -> Callable[[Map], Map]:
    """Another value in the matrices of some kinds."""
    return lambda architecture: each(
        architecture, lambda matrix: replace(matrix, **changes) if matrix.kind in kinds else matrix
    )


def four_groups(architecture: Map) -> Map:
    return replace(of_kinds("k", "v", heads=4)(architecture), n_kv_heads=4)


def other_norm(norm: Norm) -> Norm:
    """The norm behind the MLP for that behind attention, and the other way round."""
    names = ["post_attention_layernorm", "post_feedforward_layernorm"]
    ours, theirs = names if names[0] in norm.parameter else reversed(names)
    return replace(norm, parameter=norm.parameter.replace(ours, theirs))


def first_experts_exchanged(architecture: Map) -> Map:
    numbers = {0: 1, 1: 0}
    return each(architecture, lambda m: replace(m, expert=numbers.get(m.expert, m.expert)))  # pyright: ignore


def expert_halves_exchanged(architecture: Map) -> Map:
    """Up in front of gate in the stacks of experts."""
    stacks = {
        name: replace(stack, parts=tuple(parts[::-1] for parts in stack.parts))
        for name, stack in architecture.stacks.items()
    }
    return replace(architecture, stacks=stacks)


def layout(**changes: bool) -> Callable[[Map], Map]:
    """Another layout of the stacks of experts."""
    return lambda architecture: replace(
        architecture,
        stacks={name: replace(stack, **changes) for name, stack in architecture.stacks.items()},
    )


def inner_is_mapped(architecture: Map) -> Map:
    """The matrices behind latents taken for some that read the stream."""
    matrices = (
        ResidualMatrix(0, "q_a", name.removesuffix(".weight")) for name in architecture.inner if ".0." in name
    )
    return replace(architecture, matrices=(*architecture.matrices, *matrices))


def output_is_inner(architecture: Map) -> Map:
    """The matrix that writes for attention taken for an inner one."""
    o = [matrix.parameter for matrix in architecture.matrices if matrix.kind == "o"]
    matrices = tuple(matrix for matrix in architecture.matrices if matrix.kind != "o")
    return replace(architecture, matrices=matrices, inner=(*architecture.inner, *o))


def query_is_inner(architecture: Map) -> Map:
    """The matrix that reads the latent of queries taken for an inner one."""
    q = [matrix.parameter for matrix in architecture.matrices if matrix.kind == "q_a"]
    matrices = tuple(matrix for matrix in architecture.matrices if matrix.kind != "q_a")
    return replace(architecture, matrices=matrices, inner=(*architecture.inner, *q))


def shared_halves_exchanged(architecture: Map) -> Map:
    """Gate for up in the expert that all tokens share."""
    kinds: dict[Kind, Kind] = {"shared_gate": "shared_up", "shared_up": "shared_gate"}
    return each(architecture, lambda matrix: replace(matrix, kind=kinds.get(matrix.kind, matrix.kind)))


def without_shared(architecture: Map) -> Map:
    matrices = (matrix for matrix in architecture.matrices if not matrix.kind.startswith("shared"))
    return replace(architecture, matrices=tuple(matrices))


def mlp_read_at_attention(architecture: Map) -> Map:
    attention = {site.layer: site.module for site in architecture.sites if site.name == "attention_input"}
    sites = (Site(site.layer, site.name, attention[site.layer]) for site in architecture.sites)
    return replace(architecture, sites=tuple(sites))


def with_gates(architecture: Map) -> tuple[ResidualMatrix, ...]:
    gates = (
        replace(matrix, kind="gate", module=matrix.module.replace("up_proj", "gate_proj"))
        for matrix in architecture.matrices
        if matrix.kind == "up"
    )
    return (*architecture.matrices, *gates)


def without_up(architecture: Map) -> Map:
    return replace(architecture, matrices=tuple(m for m in architecture.matrices if m.kind != "up"))


THIRDS = {kind: Rows(1, 3 * D, place * D, D) for place, kind in enumerate("qkv")}
BY_HEAD = {
    kind: Rows(HEADS, 3 * D // HEADS, place * D // HEADS, D // HEADS) for place, kind in enumerate("qkv")
}
HALVES = {kind: Rows(2, 40, place * 20, 20) for place, kind in enumerate(("gate", "up"))}

# By what is wrong: the network, the map made wrong, and the invariants that it must break.
WRONG: dict[str, tuple[str, Callable[[Map], Map], set[str]]] = {
    "q and k exchanged in a fused weight": (
        "gpt2",
        swapped("q", "k"),
        {"queries_act_at_their_token_and_head", "keys_act_on_later_tokens_of_their_group"},
    ),
    "q and k exchanged, fused by head": (
        "gpt_neox",
        swapped("q", "k"),
        {"queries_act_at_their_token_and_head"},
    ),
    "k and v exchanged": (
        "gpt2",
        swapped("k", "v"),
        {"values_act_linearly_on_their_group", "values_act_through_o"},
    ),
    "gate and up exchanged": ("phi3", swapped("gate", "up"), {"hidden_units_stay_apart"}),
    "thirds for heads": (
        "gpt_neox",
        fused(THIRDS),
        {"queries_act_at_their_token_and_head", "keys_act_through_queries"},
    ),
    "heads for thirds": ("gpt2", fused(BY_HEAD), {"queries_act_at_their_token_and_head"}),
    "halves of gate and up for one another": (
        "phi3",
        fused(HALVES),
        {"hidden_units_stay_apart", "gates_act_through_up"},
    ),
    "a square weight not transposed": (
        "gpt2",
        of_kinds("o", transposed=False),
        {"modules_apply_their_matrices", "writes_reach_the_stream"},
    ),
    "four key-value groups for two": (
        "llama",
        four_groups,
        {"sizes_agree", "keys_act_on_later_tokens_of_their_group", "values_act_linearly_on_their_group"},
    ),
    "a multiplier forgotten": ("granite", of_kinds("o", "down", factor=1.0), {"writes_reach_the_stream"}),
    "a multiplier of reads": ("granite", of_kinds("o", "q", factor=0.2), {"writes_reach_the_stream"}),
    "heads for groups of several queries": (
        "falcon_new",
        fused({"k": Rows(2, 4 * 8, 8, 8), "q": Rows(2, 4 * 8, 16, 16)}),
        {"queries_act_at_their_token_and_head", "keys_act_on_later_tokens_of_their_group"},
    ),
    "groups for the heads of all": (
        "falcon_sequential",
        fused({kind: Rows(1, 3 * D, place * D, D) for place, kind in enumerate("qkv")}),
        {"queries_act_at_their_token_and_head"},
    ),
    "the norm in front of the MLP for that behind it": (
        "glm4",
        norms(lambda norm: replace(norm, parameter=norm.parameter.replace("post_mlp", "post_attention"))),
        {"writes_reach_the_stream"},
    ),
    "a gate that is not there": (
        "apertus",
        lambda architecture: replace(architecture, matrices=with_gates(architecture)),
        {"parts_exist"},
    ),
    "write norms forgotten": ("olmo2", norms(lambda norm: None), {"writes_reach_the_stream"}),
    "write norms exchanged": ("olmo3", norms(other_norm), {"writes_reach_the_stream"}),
    "write norms that are others": (
        "llama",
        of_kinds("o", norm=Norm("model.layers.0.input_layernorm.weight")),
        {"writes_reach_the_stream"},
    ),
    "gain of a write norm without its 1": (
        "gemma2",
        norms(lambda norm: replace(norm, offset=0.0)),
        {"writes_reach_the_stream", "norms_have_their_gain"},
    ),
    "gain of the final norm without its 1": (
        "gemma3_text",
        lambda architecture: replace(architecture, final_norm=replace(architecture.final_norm, offset=0.0)),
        {"norms_have_their_gain"},
    ),
    "gain of the final norm with a 1": (
        "smollm3",
        lambda architecture: replace(architecture, final_norm=replace(architecture.final_norm, offset=1.0)),
        {"norms_have_their_gain"},
    ),
    "another final norm": (
        "llama",
        lambda architecture: replace(architecture, final_norm=Norm("model.layers.1.input_layernorm.weight")),
        {"logits_are_unembedded"},
    ),
    "tying forgotten": (
        "llama_tied",
        lambda architecture: replace(architecture, tied=False),
        {"tying_is_the_networks", "logits_are_unembedded"},
    ),
    "tied by mistake": (
        "llama",
        lambda architecture: replace(architecture, tied=True),
        {"tying_is_the_networks"},
    ),
    "not parallel by mistake": (
        "gptj",
        lambda architecture: replace(architecture, parallel=False),
        {"parallel_layers_read_one_stream"},
    ),
    "parallel by mistake": (
        "opt",
        lambda architecture: replace(architecture, parallel=True),
        {"parallel_layers_read_one_stream"},
    ),
    "the other embedding": (
        "llama",
        lambda architecture: replace(architecture, embed="lm_head.weight"),
        {"tokens_have_their_rows"},
    ),
    "a module that is not there": (
        "qwen2",
        of_kinds("up", module="model.layers.0.mlp.fc1"),
        {"parts_exist"},
    ),
    "a layer too few": (
        "qwen2",
        lambda architecture: replace(architecture, n_layers=1),
        {"sizes_agree", "every_weight_is_mapped_once"},
    ),
    "no up": ("mistral", without_up, {"layers_are_complete", "every_weight_is_mapped_once"}),
    "the MLP read at the attention site": ("opt", mlp_read_at_attention, {"inputs_are_at_their_site"}),
    "names on disk of another type": (
        "gpt_neox",
        lambda architecture: replace(architecture, model_type="llama"),
        {"checkpoints_have_the_names"},
    ),
    "experts exchanged": ("qwen3_moe", first_experts_exchanged, {"experts_are_their_own"}),
    "up in front of gate in the experts": (
        "qwen3_moe",
        expert_halves_exchanged,
        {"experts_are_their_own", "checkpoints_have_the_names"},
    ),
    "halves for alternating rows": (
        "gpt_oss",
        layout(interleaved=False),
        {"experts_are_their_own"},
    ),
    "experts not transposed": ("llama4_text", layout(transposed=False), {"sizes_agree"}),
    "halves of latent and rotary keys exchanged": (
        "deepseek_v3",
        fused({"kv_a": Rows(1, 16, 4, 12), "k_rope": Rows(1, 16, 0, 4)}),
        {"keys_act_through_queries"},
    ),
    "latent and rotary keys exchanged": (
        "deepseek_v3",
        fused({"kv_a": Rows(1, 16, 12, 4), "k_rope": Rows(1, 16, 0, 12)}),
        {"latents_carry_keys_and_values", "keys_act_through_queries", "values_act_through_o"},
    ),
    "matrices behind latents that read": (
        "deepseek_v3",
        inner_is_mapped,
        {"inputs_are_at_their_site", "sizes_agree"},
    ),
    "an inner matrix that writes": (
        "deepseek_v3",
        output_is_inner,
        {"inner_matrices_lie_between", "layers_are_complete"},
    ),
    "an inner matrix that reads": (
        "deepseek_v3",
        query_is_inner,
        {"inner_matrices_lie_between", "layers_are_complete"},
    ),
    "shared gate and up exchanged": (
        "deepseek_v3",
        shared_halves_exchanged,
        {"hidden_units_stay_apart"},
    ),
    "a shared expert forgotten": (
        "llama4_text",
        without_shared,
        {"every_weight_is_mapped_once", "writes_reach_the_stream"},
    ),
    "experts that read at another site": (
        "mixtral",
        mlp_read_at_attention,
        {"inputs_are_at_their_site", "experts_read_their_site"},
    ),
    "linear attention's q and k exchanged": (
        "qwen3_5_text",
        swapped("linear_q", "linear_k"),
        {"mixers_act_in_their_time_and_heads"},
    ),
    "linear attention's v and z exchanged": (
        "qwen3_next",
        swapped("linear_v", "linear_z"),
        {"mixers_act_in_their_time_and_heads"},
    ),
    "linear attention's strength and decay exchanged": (
        "qwen3_5_text",
        exchanged("linear_a", "linear_b"),
        {"decays_act_on_the_past"},
    ),
    "the attention gate in front of q": (
        "qwen3_5_text",
        swapped("q", "attention_gate"),
        {"gates_act_at_their_unit", "keys_act_through_queries"},
    ),
    "z and x of Mamba exchanged": (
        "nemotron_h",
        swapped("mamba_z", "mamba_x"),
        {"mixers_act_in_their_time_and_heads"},
    ),
    "z of Mamba that begins with its second half": (
        "falcon_h1",
        of_kinds("mamba_z", rows=Rows(1, 72, 12, 24)),
        {"mixer_units_stay_apart", "every_weight_is_mapped_once"},
    ),
    "a multiplier of a mixer forgotten": (
        "falcon_h1",
        of_kinds("mamba_o", factor=1.0),
        {"writes_reach_the_stream"},
    ),
    "a layer without its mixer": (
        "lfm2",
        lambda architecture: replace(
            architecture, matrices=tuple(m for m in architecture.matrices if m.block != "mixer")
        ),
        {"every_weight_is_mapped_once"},
    ),
    "a shared expert's router for that of the experts": (
        "qwen3_5_moe_text",
        exchanged("shared_router", "shared_up"),
        {"hidden_units_stay_apart"},
    ),
    "the weight of the shared expert that is another matrix": (
        "qwen3_next",
        of_kinds("shared_router", module="model.layers.0.linear_attn.in_proj_ba"),
        {"shared_routers_weight_the_shared_expert"},
    ),
}


def planted(wrong: str) -> Specimen:
    name, change, _ = WRONG[wrong]
    return Specimen.of(right(name).network.config, change(right(name).architecture))


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_map_breaks_the_invariants_that_it_must(wrong):
    specimen = planted(wrong)
    for invariant in INVARIANTS:
        if invariant.__name__ in WRONG[wrong][2]:
            assert failure(invariant, specimen) is not None, invariant.__name__


def test_every_invariant_is_broken_by_a_wrong_map():
    assert {invariant.__name__ for invariant in INVARIANTS} == set().union(
        *(row[2] for row in WRONG.values())
    )


def test_the_sentence_of_a_failure_names_the_matrix_and_the_places_that_changed():
    with pytest.raises(
        ValueError, match=r"head 0 of L0\.q, changed at token 2, changes the attention output at"
    ):
        queries_act_at_their_token_and_head(planted("q and k exchanged in a fused weight"))
