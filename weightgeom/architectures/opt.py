"""OPT, all sizes but the 350M."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import OPTConfig

NAMES = Names(
    embed="model.decoder.embed_tokens",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    o="self_attn.out_proj",
    gate=None,
    up="fc1",
    down="fc2",
)


def architecture(config: "OPTConfig") -> Architecture:
    """The MLP has no module of its own; post-norms and projected embeddings (opt-350m) are refused."""
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        raise NotImplementedError(
            "no residual-stream map for an OPT with post-norms or projected embeddings (opt-350m):"
            " use another size, such as facebook/opt-125m"
        )
    return decoder(config, NAMES)
