"""LFM2."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.mixers import Parts, fused, mixed
from weightgeom.models.residual import Architecture, ResidualMatrix

if TYPE_CHECKING:
    from transformers import Lfm2Config

NAMES = Names(
    final_norm="model.embedding_norm",
    o="self_attn.out_proj",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
)


def architecture(config: "Lfm2Config") -> Architecture:
    """Softmax attention in some layers; short convolutions of B x, whose output C gates, in the others."""
    types = config.layer_types or []
    return mixed(
        decoder(config, NAMES),
        [("mlp",) if kind == "conv" else ("attention", "mlp") for kind in types],
        {layer: convolution(config, layer) for layer, kind in enumerate(types) if kind == "conv"},
    )


def convolution(config: "Lfm2Config", layer: int) -> list[ResidualMatrix]:
    """B, C and x, in this order, and the output."""
    module, d = f"model.layers.{layer}.conv", config.hidden_size
    parts: Parts = {"conv_B": (1, d), "conv_C": (1, d), "conv_x": (1, d)}
    return [*fused(layer, f"{module}.in_proj", parts), ResidualMatrix(layer, "conv_o", f"{module}.out_proj")]
