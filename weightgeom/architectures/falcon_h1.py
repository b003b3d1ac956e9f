"""Falcon-H1."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.mixers import mamba, mixed
from weightgeom.models.residual import Architecture, Block, Kind

if TYPE_CHECKING:
    from transformers import FalconH1Config

NAMES = Names(
    final_norm="model.final_layernorm",
    gate="feed_forward.gate_proj",
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
)


def architecture(config: "FalconH1Config") -> Architecture:
    """Softmax attention and Mamba-2 side by side, then an MLP; their outputs are multiplied by constants."""
    given: Any = config  # whose hints allow for None, which the network does not
    sizes = (
        given.mamba_n_heads,
        given.mamba_d_ssm or int(given.mamba_expand * given.hidden_size),
        given.mamba_n_groups,
        given.mamba_d_state,
    )
    layers = range(config.num_hidden_layers)
    mixers = {layer: mamba(layer, f"model.layers.{layer}.mamba", *sizes) for layer in layers}
    kept: tuple[Block, ...] = ("attention", "mlp")
    whole = mixed(decoder(config, NAMES), [kept for _ in layers], mixers)
    factors: dict[Kind, float] = {
        "o": given.attention_out_multiplier,
        "mamba_o": given.ssm_out_multiplier,
        "down": given.mlp_multipliers[1],
    }
    matrices = (replace(matrix, factor=factors.get(matrix.kind, 1.0)) for matrix in whole.matrices)
    return replace(whole, matrices=tuple(matrices))
