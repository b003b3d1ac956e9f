"""The residual map shared by Llama-like decoders: RMS norms, rotary positions and a gated MLP."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from weightgeom.models.residual import Architecture, Kind, Norm, ResidualMatrix, Stack, input_sites

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Reads = Callable[["PreTrainedConfig", int], tuple[ResidualMatrix, ...]]
"""The matrices of one layer that read the residual stream: q, k, v, gate and up."""


def head_size(config: "PreTrainedConfig") -> int:
    """The width of one head, which need not be d_model / heads where the config names it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def separate_reads(config: "PreTrainedConfig", layer: int) -> tuple[ResidualMatrix, ...]:
    """One module for each reading matrix, as in Llama."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return (
        ResidualMatrix(layer, "q", f"{attention}.q_proj", heads),
        ResidualMatrix(layer, "k", f"{attention}.k_proj", groups),
        ResidualMatrix(layer, "v", f"{attention}.v_proj", groups),
        ResidualMatrix(layer, "gate", f"{mlp}.gate_proj"),
        ResidualMatrix(layer, "up", f"{mlp}.up_proj"),
    )


def gated_decoder(
    config: "PreTrainedConfig",
    reads: Reads = separate_reads,
    post_norms: bool = False,
    norm_offset: float = 0.0,
    sparse: Callable[[int], bool] = lambda layer: False,
) -> Architecture:
    """A Llama-like decoder; `post_norms` if attention and MLP outputs are normed before the stream.

    Layers that are `sparse` have a router and experts for an MLP. Without post norms a layer's
    `post_attention_layernorm` is, despite its name, the norm in front of the MLP.
    """
    matrices: list[ResidualMatrix] = []
    for layer in range(config.num_hidden_layers):
        dense = (*reads(config, layer), *_writes(config, layer, post_norms, norm_offset))
        attention = (matrix for matrix in dense if matrix.kind in ("q", "k", "v", "o"))
        matrices += (*attention, *_mixture(config, layer)) if sparse(layer) else dense
    stacks: dict[str, Stack] = {}
    for layer in filter(sparse, range(config.num_hidden_layers)):
        stacks |= _stacks(config, layer)
    return Architecture(
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_head=head_size(config),
        matrices=tuple(matrices),
        sites=input_sites(matrices),
        embed="model.embed_tokens.weight",
        unembed="lm_head.weight",
        final_norm=Norm("model.norm.weight", norm_offset),
        aliases={},
        tied=config.tie_word_embeddings,
        stacks=stacks,
    )


def _mixture(config: "PreTrainedConfig", layer: int) -> tuple[ResidualMatrix, ...]:
    mlp = f"model.layers.{layer}.mlp"
    kinds: tuple[Kind, ...] = ("gate", "up", "down")
    return (
        ResidualMatrix(layer, "router", f"{mlp}.gate"),
        *(
            ResidualMatrix(layer, kind, f"{mlp}.experts.{expert}.{kind}_proj", expert=expert)
            for expert in range(config.num_experts)
            for kind in kinds
        ),
    )


def _stacks(config: "PreTrainedConfig", layer: int) -> dict[str, Stack]:
    experts = f"model.layers.{layer}.mlp.experts"
    return {
        f"{experts}.{name}": tuple(
            tuple(f"{experts}.{expert}.{part}_proj.weight" for part in parts)
            for expert in range(config.num_experts)
        )
        for name, parts in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items()
    }


def _writes(
    config: "PreTrainedConfig", layer: int, post_norms: bool, norm_offset: float
) -> tuple[ResidualMatrix, ResidualMatrix]:
    block = f"model.layers.{layer}"
    attention_norm = Norm(f"{block}.post_attention_layernorm.weight", norm_offset)
    mlp_norm = Norm(f"{block}.post_feedforward_layernorm.weight", norm_offset)
    return (
        ResidualMatrix(
            layer,
            "o",
            f"{block}.self_attn.o_proj",
            config.num_attention_heads,
            norm=attention_norm if post_norms else None,
        ),
        ResidualMatrix(layer, "down", f"{block}.mlp.down_proj", norm=mlp_norm if post_norms else None),
    )
