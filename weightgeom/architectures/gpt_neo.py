"""GPT-Neo."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import GPTNeoConfig

NAMES = Names(
    embed="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    q="attn.attention.q_proj",
    k="attn.attention.k_proj",
    v="attn.attention.v_proj",
    o="attn.attention.out_proj",
    gate=None,
    up="mlp.c_fc",
    down="mlp.c_proj",
)


def architecture(config: "GPTNeoConfig") -> Architecture:
    """Separate projections without biases, but for o; local attention limits which tokens are seen."""
    return decoder(config, NAMES)
