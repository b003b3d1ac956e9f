"""The residual map shared by Llama-like decoders: RMS norms, rotary positions and a gated MLP."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import LLAMA, decoder
from weightgeom.models.residual import Architecture, Kind, ResidualMatrix, Stack, input_sites

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POST_NORMS = replace(LLAMA, attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")


def gated_decoder(
    config: "PreTrainedConfig",
    post_norms: bool = False,
    norm_offset: float = 0.0,
    sparse: Callable[[int], bool] = lambda layer: False,
) -> Architecture:
    """A Llama-like decoder; `post_norms` if attention and MLP outputs are normed before the stream.

    Layers that are `sparse` have a router and experts for an MLP. Without post norms a layer's
    `post_attention_layernorm` is, despite its name, the norm in front of the MLP.
    """
    dense = decoder(config, POST_NORMS if post_norms else LLAMA, norm_offset=norm_offset)
    matrices: list[ResidualMatrix] = []
    stacks: dict[str, Stack] = {}
    for layer in range(config.num_hidden_layers):
        of_layer = [matrix for matrix in dense.matrices if matrix.layer == layer]
        if sparse(layer):
            attention = (matrix for matrix in of_layer if matrix.kind in ("q", "k", "v", "o"))
            matrices += (*attention, *_mixture(config, layer))
            stacks |= _stacks(config, layer)
        else:
            matrices += of_layer
    return replace(dense, matrices=tuple(matrices), sites=input_sites(matrices), stacks=stacks)


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
