"""OLMo-2."""

from typing import TYPE_CHECKING

from weightgeom.models.gated_decoder import gated_decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import Olmo2Config


def architecture(config: "Olmo2Config") -> Architecture:
    """Llama's map with norms behind attention and MLP, and none in front of them.

    So q, k, v, gate and up read the raw residual stream, and `attention_input` is the stream.
    """
    return gated_decoder(config, post_norms=True)
