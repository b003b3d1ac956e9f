"""The residual map shared by Llama-like decoders: RMS norms, rotary positions and a gated MLP."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import LLAMA, decoder
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POST_NORMS = replace(LLAMA, attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")


def gated_decoder(
    config: "PreTrainedConfig",
    post_norms: bool = False,
    norm_offset: float = 0.0,
    sparse: Callable[[int], bool] | None = None,
) -> Architecture:
    """A Llama-like decoder; `post_norms` if attention and MLP outputs are normed before the stream.

    Layers that are `sparse` have a router and experts for an MLP, under Qwen3's names. Without post norms a
    layer's `post_attention_layernorm` is, despite its name, the norm in front of the MLP.
    """
    dense = decoder(config, POST_NORMS if post_norms else LLAMA, norm_offset=norm_offset)
    if sparse is None:
        return dense
    return with_experts(dense, config.model_type, Mixture(config.num_experts), sparse)
