"""Phi-1 to Phi-2."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import PhiConfig

NAMES = Names(
    final_norm="model.final_layernorm", o="self_attn.dense", gate=None, up="mlp.fc1", down="mlp.fc2"
)


def architecture(config: "PhiConfig") -> Architecture:
    """Attention and MLP side by side behind one LayerNorm; the unembedding has a bias."""
    return decoder(config, NAMES, parallel=True)
