"""The names on disk that transformers 5 knows of: renamings in `transformers.conversion_mapping`."""

from collections.abc import Callable


def renaming(model_type: str) -> Callable[[str], str]:
    """The library's name for a parameter on disk when it loads a causal language model of a type.

    Its renamings and changes of prefixes are applied in turn: those of the network's class or, where it has
    none, those of the type (`get_checkpoint_conversion_mapping`). Merged and split tensors are left alone.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    network = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    entries = get_checkpoint_conversion_mapping(network) or get_checkpoint_conversion_mapping(model_type)
    renamings = [entry for entry in entries or () if isinstance(entry, WeightRenaming)]

    def renamed(name: str) -> str:
        for entry in renamings:
            name, _ = entry.rename_source_key(name)
        return name

    return renamed
