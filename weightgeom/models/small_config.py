"""A config of the type and structure of another, for a network of some ten thousand parameters."""

from typing import TYPE_CHECKING, Any

from weightgeom.models.residual import Architecture, architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEADS = 4
# By the names that configs have for them; a size that a config lacks, or leaves empty, stays so.
SIZES = {
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "num_attention_heads": HEADS,
    "intermediate_size": 40,
    "ffn_dim": 40,
    "n_inner": 40,
    "intermediate_size_mlp": 44,
    "moe_intermediate_size": 12,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,  # the two together
    "v_head_dim": 6,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
AT_MOST = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,  # of experts, of which topk_group are chosen
    "topk_group": 1,
}
NUMBERS_OF_LAYERS = ("moe_layers", "mlp_only_layers")  # lists that are not by layer, however long they are
LEFT_OUT = (
    "rope_",
    "quantization_config",
    "_name_or_path",
)  # positions are then the default ones of the type


def small_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The config with small sizes and so few layers that each sort of layer is still there.

    Norms, biases, tying, experts, and whether there are fewer key-value heads or wider heads than
    d_model / heads, are those of the config.

    Raises:
        NotImplementedError: if the type has no residual-stream map.
    """
    layers = _layers(config, architecture_of(config))
    given = {
        name: value[:layers] if _is_by_layer(name, value, config) else value
        for name, value in config.to_dict().items()
        if not name.startswith(LEFT_OUT)
    }
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": layers}
    sizes |= {name: min(most, getattr(config, name, 0)) for name, most in AT_MOST.items()}
    if groups := given.get("num_key_value_heads"):
        share = config.num_attention_heads // groups
        sizes["num_key_value_heads"] = {1: HEADS, config.num_attention_heads: 1}.get(share, HEADS // 2)
    if width := given.get("head_dim"):
        default = SIZES["hidden_size"] // HEADS
        is_default = width * config.num_attention_heads == config.hidden_size
        sizes["head_dim"] = default if is_default else 2 * default
    if given.get("kv_lora_rank"):  # of latent attention, where it is the width of the rotary part
        sizes["head_dim"] = SIZES["qk_rope_head_dim"]
    named = {config.attribute_map.get(name, name): size for name, size in sizes.items()}
    return type(config)(**given | {name: size for name, size in named.items() if given.get(name) is not None})


def _layers(config: "PreTrainedConfig", architecture: Architecture) -> int:
    """The fewest layers, two at least, with one of each sort by the config's lists and the map's kinds."""
    lists = [value for name, value in config.to_dict().items() if _is_by_layer(name, value, config)]
    kinds = {layer: set[str]() for layer in range(config.num_hidden_layers)}
    for matrix in architecture.matrices:
        kinds[matrix.layer].add(matrix.kind)
    sorts = [
        repr((sorted(kinds[layer]), [value[layer] for value in lists]))
        for layer in range(config.num_hidden_layers)
    ]
    last_new = max(sorts.index(sort) for sort in sorts)
    return min(config.num_hidden_layers, max(2, last_new + 1))


def _is_by_layer(name: str, value: Any, config: "PreTrainedConfig") -> bool:
    is_of_layers = isinstance(value, list) and len(value) == config.num_hidden_layers
    return is_of_layers and name not in NUMBERS_OF_LAYERS
