"""Nemotron-H and Nemotron 3."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightgeom.models.decoder import Names, decoder
from weightgeom.models.mixers import mamba, mixed
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
BLOCKS: Mapping[str, tuple[Block, ...]] = {"full_attention": ("attention",), "mlp": ("mlp",)}


def architecture(config: "NemotronHConfig") -> Architecture:
    """Every layer is Mamba-2, softmax attention or an MLP without a gate."""
    heads, groups = config.mamba_num_heads, config.n_groups
    inner, state = heads * config.mamba_head_dim, config.ssm_state_size
    types = config.layers_block_type or []
    mixers = {
        layer: mamba(layer, f"model.layers.{layer}.mixer", heads=heads, inner=inner, groups=groups, state=state)
        for layer, kind in enumerate(types)
        if kind == "linear_attention"
    }
    return mixed(decoder(config, NAMES), [BLOCKS.get(kind, ()) for kind in types], mixers)
