"""Nemotron-H and Nemotron 3."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.mixers import mamba, mixed
from weightgeom.models.mixture import Mixture, with_experts
from weightgeom.models.residual import Architecture, Block

if TYPE_CHECKING:
    from transformers import NemotronHConfig

NAMES = Names(
    embed="model.embeddings",
    final_norm="model.norm_f",
    q="mixer.q_proj",
    k="mixer.k_proj",
    v="mixer.v_proj",
    o="mixer.o_proj",
    gate=None,
    up="mixer.up_proj",
    down="mixer.down_proj",
)
BLOCKS: Mapping[str, tuple[Block, ...]] = {
    "full_attention": ("attention",),
    "mlp": ("mlp",),
    "moe": ("mlp",),
}


def architecture(config: "NemotronHConfig") -> Architecture:
    """Every layer is one of Mamba-2, softmax attention, an MLP without a gate, or such MLPs as experts.

    Experts that work in a space of their own (`moe_latent_size`) are refused. The network never ties its
    unembedding.
    """
    types = config.layers_block_type or []
    if "moe" in types and config.moe_latent_size is not None:
        raise NotImplementedError(
            "no residual-stream map for a Nemotron-H whose experts read a projection (moe_latent_size): use a"
            " model whose config leaves it empty"
        )
    heads = config.mamba_num_heads
    sizes = heads, heads * config.mamba_head_dim, config.n_groups, config.ssm_state_size
    mixers = {
        layer: mamba(layer, f"model.layers.{layer}.mixer", *sizes)
        for layer, kind in enumerate(types)
        if kind == "linear_attention"
    }
    mixture = Mixture(config.n_routed_experts, "mixer", shared="shared_experts", gated=False)
    every = decoder(config, NAMES)
    every = with_experts(every, config.model_type, mixture, lambda layer: types[layer] == "moe")
    return replace(mixed(every, [BLOCKS.get(kind, ()) for kind in types], mixers), tied=False)
