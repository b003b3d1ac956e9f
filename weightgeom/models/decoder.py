"""The residual map of a decoder, given the names of its modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightgeom.models.residual import Architecture, Kind, Norm, ResidualMatrix, Rows, input_sites

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Names:
    """The module names of a decoder, from `q` on within a layer; Llama's are the defaults.

    Kinds that share a name are fused in one weight. `attention_norm` and `mlp_norm` are the norms between the
    output of attention or MLP and the residual stream, where the decoder has them.
    """

    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    unembed: str = "lm_head"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    attention_gate: str | None = None
    o: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str | None = None
    mlp_norm: str | None = None


LLAMA = Names()
NOT_FUSED: Mapping[Kind, Rows] = {}


def decoder(
    config: "PreTrainedConfig",
    names: Names = LLAMA,
    *,
    rows: Mapping[Kind, Rows] = NOT_FUSED,
    transposed: bool = False,
    norm_offset: float = 0.0,
    parallel: bool = False,
    groups: int | None = None,
    factor: float = 1.0,
) -> Architecture:
    """The map of a decoder whose layers are attention and an MLP.

    `rows` has the rows of each kind in a fused weight. Weights that are `transposed` are stored as
    (d_in, d_out). The gain of a norm is its stored weight plus `norm_offset`. There are as many key-value
    heads as the config says, or `groups`. The outputs of o and down are multiplied by `factor` on the way to
    the stream. The other arguments are as in `Architecture`.
    """
    heads, groups = config.num_attention_heads, groups or kv_heads(config)
    blocks: dict[Kind, int] = {"q": heads, "k": groups, "v": groups, "attention_gate": heads, "o": heads}
    modules: dict[Kind, str | None] = {
        "q": names.q,
        "k": names.k,
        "v": names.v,
        "attention_gate": names.attention_gate,
        "gate": names.gate,
        "up": names.up,
        "o": names.o,
        "down": names.down,
    }
    norms: dict[Kind, str | None] = {"o": names.attention_norm, "down": names.mlp_norm}

    def norm(layer: int, kind: Kind) -> Norm | None:
        name = norms.get(kind)
        return None if name is None else Norm(f"{names.layers}.{layer}.{name}.weight", norm_offset)

    matrices = tuple(
        ResidualMatrix(
            layer,
            kind,
            f"{names.layers}.{layer}.{module}",
            blocks.get(kind, 1),
            rows.get(kind),
            transposed,
            norm(layer, kind),
            factor=factor if kind in ("o", "down") else 1.0,
        )
        for layer in range(config.num_hidden_layers)
        for kind, module in modules.items()
        if module is not None
    )
    return Architecture(
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=groups,
        d_head=head_size(config),
        matrices=matrices,
        sites=input_sites(matrices),
        embed=f"{names.embed}.weight",
        unembed=f"{names.unembed}.weight",
        final_norm=Norm(f"{names.final_norm}.weight", norm_offset),
        model_type=config.model_type,
        tied=config.tie_word_embeddings,
        parallel=parallel,
    )


def kv_heads(config: "PreTrainedConfig") -> int:
    """The key-value heads: as many as there are query heads where the config names none."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size(config: "PreTrainedConfig") -> int:
    """The width of one head, which need not be d_model / heads where the config names it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def fused_by_group(config: "PreTrainedConfig", groups: int) -> dict[Kind, Rows]:
    """The rows of q, k and v in a weight with the order [group][queries, key, value][d_head].

    A group is a key-value head with the queries that share it: GPT-NeoX has as many as heads.
    """
    d_head, queries = head_size(config), config.num_attention_heads // groups
    stride = (queries + 2) * d_head
    return {
        "q": Rows(groups, stride, 0, queries * d_head),
        "k": Rows(groups, stride, queries * d_head, d_head),
        "v": Rows(groups, stride, (queries + 1) * d_head, d_head),
    }
