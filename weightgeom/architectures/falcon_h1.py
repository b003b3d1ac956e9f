"""Falcon-H1."""

from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.mixers import mamba, mixed
from weightgeom.models.residual import Architecture, Kind

if TYPE_CHECKING:
    from transformers import FalconH1Config

NAMES = Names(
    final_norm="model.final_layernorm",
    gate="feed_forward.gate_proj",
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
)


def architecture(config: "FalconH1Config") -> Architecture:
    """Softmax attention and Mamba-2 side by side, then an MLP; the network multiplies what they write."""
    inner = config.mamba_d_ssm or int((config.mamba_expand or 1) * config.hidden_size)
    heads, groups, state = config.mamba_n_heads, config.mamba_n_groups, config.mamba_d_state
    layers = range(config.num_hidden_layers)
    mixers = {
        layer: mamba(layer, f"model.layers.{layer}.mamba", heads=heads, inner=inner, groups=groups, state=state)
        for layer in layers
    }
    factors: dict[Kind, float | None] = {
        "o": config.attention_out_multiplier,
        "mamba_o": config.ssm_out_multiplier,
        "down": (config.mlp_multipliers or [1.0, 1.0])[1],
    }
    whole = mixed(decoder(config, NAMES), [("attention", "mlp") for _ in layers], mixers)
    matrices = (replace(one, factor=factors.get(one.kind) or 1.0) for one in whole.matrices)
    return replace(whole, matrices=tuple(matrices))
