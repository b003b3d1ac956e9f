"""GPT-J."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import GPTJConfig

NAMES = Names(
    embed="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    o="attn.out_proj",
    gate=None,
    up="mlp.fc_in",
    down="mlp.fc_out",
)


def architecture(config: "GPTJConfig") -> Architecture:
    """Attention and MLP side by side behind one LayerNorm; the unembedding has a bias."""
    return decoder(config, NAMES, parallel=True)
