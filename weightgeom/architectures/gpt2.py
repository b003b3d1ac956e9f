"""GPT-2."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.residual import Architecture, Rows

if TYPE_CHECKING:
    from transformers import GPT2Config

QKV = "attn.c_attn"
NAMES = Names(
    *("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head", QKV, QKV, QKV),
    o="attn.c_proj",
    gate=None,
    up="mlp.c_fc",
    down="mlp.c_proj",
)


def architecture(config: "GPT2Config") -> Architecture:
    """Every weight stored transposed (Conv1D), q, k and v fused as thirds of its columns."""
    d = config.n_embd
    return decoder(
        config,
        NAMES,
        rows={"q": Rows(1, 3 * d, 0, d), "k": Rows(1, 3 * d, d, d), "v": Rows(1, 3 * d, 2 * d, d)},
        transposed=True,
    )
