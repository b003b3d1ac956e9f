"""Loading of networks, tokenizers and configs from a checkpoint directory."""

import logging
import re
from collections.abc import Collection, Mapping
from filecmp import cmp
from functools import cache
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightgeom.models.adapters import CONFIG, as_pair, is_adapter
from weightgeom.models.experts import stacked
from weightgeom.models.gguf_files import gguf_config, gguf_tokenizer, is_gguf
from weightgeom.models.json_files import is_lfs_pointer, json_object
from weightgeom.models.language_model import LanguageModel, _without_weights, name_body, trusted
from weightgeom.models.quantisation import check_not_quantised
from weightgeom.models.remote import remote_file
from weightgeom.models.residual import Architecture, architecture_of, text_part
from weightgeom.models.weights import Dequantised, Stored, nested, open_params
from weightgeom.text.files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
LAYERS, EXPERTS, POSITIONS = 4096, 2**18, 2**17  # more than any model has, and few enough to list
OF_TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# The settings of a network by which the same weights compute something else.
COMPUTING = (
    *(
        "model_type",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "layer_types",
        "sliding_window",
    ),
    *("hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps"),
    *("layer_norm_epsilon", "rope_parameters", "use_parallel_residual", "num_experts_per_tok"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
OTHER_MODALITY = re.compile("image|audio|video|vision", re.IGNORECASE)


def load(directory: Path, device: str) -> LanguageModel:
    """The model of a local checkpoint directory in evaluation mode, with its tokenizer; reads no weights.

    Raises:
        NotImplementedError: if its `model_type` has no residual-stream map.
        FileNotFoundError: if the directory, its config, its weights or its tokenizer is missing.
        ValueError: if a file is truncated or corrupt, if a parameter is missing, or if the tokenizer has
            no end token.
    """
    architecture = load_architecture(directory)
    stored = open_params(directory, architecture)
    try:
        network = _without_weights(load_config(directory), torch.device(device))
    except Exception as error:  # sizes that do not go together raise whatever the network makes of them
        raise ValueError(f"{directory / 'config.json'} cannot be used: {first_line(error)}") from error
    names = set(stacked(stored, architecture.stacks))
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    check_complete(directory, shapes.keys() - names)
    assert isinstance(stored, Stored | Dequantised)
    for name in stored:
        if name in shapes and stored.shape(name) != shapes[name]:
            raise ValueError(
                f"{name} of {directory} is of shape {stored.shape(name)}, and its config's network has it of"
                f" shape {shapes[name]}: save the config and the weights together"
            )
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, stored.shape(architecture.embed)[0])
    return LanguageModel(network, tokenizer, architecture, torch.device(device))


def unloaded(
    config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> LanguageModel:
    """The model of a config in evaluation mode, without weights.

    Raises:
        NotImplementedError: if its `model_type` has no residual-stream map.
    """
    architecture = architecture_of(config)
    return LanguageModel(_without_weights(config, device), tokenizer, architecture, device)


def parameters_of(config: "PreTrainedConfig") -> int:
    """The number of parameters of a network, from its config alone; tied ones count once."""
    network = _without_weights(config, torch.device("meta"))
    return sum(parameter.numel() for parameter in network.parameters())


def check_complete(directory: Path, missing: Collection[str]) -> None:
    """Raise ValueError if a checkpoint lacks parameters of the network: they would stay random."""
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of the network's parameters, the first {min(missing)}:"
            " save the whole model, with its language-model head"
        )


def check_length(longest: int, context: int | None) -> None:
    """Raise ValueError if sequences of `longest` tokens exceed the context that a model was made for."""
    if context is not None and longest > context:
        raise ValueError(f"max_length is {longest} tokens and the model takes {context}: lower it to that")


def check_tokenizer(directory: Path, only_if_there: bool = False) -> None:
    """Raise ValueError if the tokenizer of a checkpoint has more tokens than its config embeddings."""
    try:
        tokenizer = load_tokenizer(directory)
    except FileNotFoundError:
        if only_if_there:
            return
        raise
    try:
        check_vocabulary(tokenizer, load_config(directory).vocab_size)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
    """Raise ValueError if a tokenizer has tokens that a model with `rows` embeddings has none for.

    Tokens that stand for images, sounds and videos may go without, as text has none of them.
    """
    excess = [token for token, number in tokenizer.get_vocab().items() if number >= rows]
    if [token for token in excess if not OTHER_MODALITY.search(token)]:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings: give the tokenizer"
            " that the model was trained with, or resize its embeddings and save it again"
        )
    if 2 * len(tokenizer) < rows:
        log.warning(
            "the tokenizer has %d tokens and the model %d embeddings: check that it is the model's own",
            *(len(tokenizer), rows),
        )


def warn_of_other_vocabulary(before: Path, after: Path) -> None:
    """Say so in the log if two checkpoints have tokenizers that give other numbers to tokens."""
    files = [directory / "tokenizer.json" for directory in (before, after)]
    if all(path.is_file() for path in files) and cmp(*files, shallow=False):
        return
    try:
        first, second = (load_tokenizer(directory) for directory in (before, after))
    except (FileNotFoundError, ValueError):  # a checkpoint that only goes with another needs none
        return
    tokens_before, tokens_after = first.get_vocab(), second.get_vocab()
    by_number = {number: token for token, number in tokens_after.items()}
    shared = [(token, by_number[number]) for token, number in tokens_before.items() if number in by_number]
    different = sum(token != another for token, another in shared)
    if 100 * different > len(shared):
        _note_other_vocabulary(str(before), str(after), different, len(shared))


@cache  # once for each pair
def _note_other_vocabulary(before: str, after: str, different: int, shared: int) -> None:
    log.warning(
        "%d of %d token numbers mean other tokens in %s than in %s: the two have different vocabularies, so"
        " text in the tokens of the one means nothing to the other",
        *(different, shared, after, before),
    )


def warn_of_other_settings(before: Path, after: Path) -> None:
    """Say so in the log if the networks of two checkpoints compute differently with the same weights."""
    if not all((directory / "config.json").is_file() for directory in (before, after)):
        return  # an adapter has that of its base
    if cmp(before / "config.json", after / "config.json", shallow=False):
        return  # as along most chains, whose configs are slow to build one by one
    first, second = (load_config(directory).to_dict() for directory in (before, after))
    different = [name for name in COMPUTING if not _same(first.get(name), second.get(name))]
    if different:
        texts = (f"{name} is {first.get(name)} and {second.get(name)}" for name in different)
        _note_other_settings(str(before), str(after), ", ".join(texts))


def _same(first: object, second: object) -> bool:
    """Whether two settings are equal; numbers up to the rounding of another file format."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)
    if isinstance(first, int | float) and isinstance(second, int | float):
        return isclose(first, second, rel_tol=1e-5)
    return first == second


@cache  # once for each pair
def _note_other_settings(before: str, after: str, different: str) -> None:
    log.warning(
        "the configs of %s and %s differ (%s): the same weights mean other computations in the two, and the"
        " update is read by the first config; check that the second was trained from the first",
        *(before, after, different),
    )


def load_context(directory: Path) -> int | None:
    """The longest sequence, in tokens, that a checkpoint's config names; None if it names none."""
    return getattr(load_config(directory), "max_position_embeddings", None)


def load_architecture(directory: Path) -> Architecture:
    """The residual-stream map that a checkpoint's config asks for; reads no weights.

    Raises:
        NotImplementedError: if its `model_type` has no map.
        ValueError: if the config cannot be read, or says that the checkpoint is quantised.
    """
    config = load_config(directory)
    if not is_gguf(directory):
        check_not_quantised(str(directory), json_object(directory / "config.json"), {})
    try:
        return architecture_of(config)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / 'config.json'} cannot be used: {first_line(error)}") from error


def load_config(directory: Path) -> "PreTrainedConfig":
    """The config of a checkpoint (its text part) or GGUF file; its own code runs only if it is trusted.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read, or needs code that is not trusted.
    """
    from transformers import AutoConfig

    if is_gguf(directory):
        return gguf_config(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: {_instead(directory)}")
    _check_sizes(path)
    trust = trusted(directory)
    try:
        config = text_part(AutoConfig.from_pretrained(directory, trust_remote_code=trust))
        sizes = {name: getattr(config, name, 1) for name in SIZES}
    except Exception as error:  # wrong values raise whatever the config's code makes of them
        if not trust and "trust_remote_code" in str(error):
            raise ValueError(
                f"{path} needs code of its own: read it, and add ++model.trust_remote_code=true to let it run"
            ) from error
        raise ValueError(f"{path} cannot be used: {first_line(error)}") from error
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**31:
            raise ValueError(f"{path} cannot be used: {name} must be a positive whole number, got {size!r}")
    config.__dict__.pop("quantization_config", None)  # weights are dequantised as they are read, or refused
    return config


def _instead(directory: Path) -> str:
    if is_adapter(directory):
        return f"it is an adapter, so compare it with its base: {as_pair(directory)}"
    inside = nested(directory)
    return f"give one of its folders, such as {inside[-1]}" if inside else "give a transformers checkpoint"


def _check_sizes(path: Path) -> None:
    """Refuse a config with more layers or experts than there can be, before they are listed one by one."""
    config = json_object(path)
    text = config.get("text_config")
    for given in (config, text if isinstance(text, dict) else {}):
        layers = _largest(given, ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
        experts = _largest(given, ("num_experts", "num_local_experts", "n_routed_experts"))
        if layers > LAYERS or layers * experts > EXPERTS:
            raise ValueError(
                f"{path} cannot be used: {layers} layers of {experts} experts each are more than {LAYERS}"
                f" layers or {EXPERTS} experts in all"
            )
        if (longest := _largest(given, ("n_positions",))) > POSITIONS:
            raise ValueError(f"{path} cannot be used: {longest} positions are more than {POSITIONS}")


def _largest(config: Mapping[str, Any], names: Collection[str]) -> int:
    return max((config[name] for name in names if isinstance(config.get(name), int)), default=1)


def load_network(directory: Path) -> "PreTrainedModel":
    """The network of a local checkpoint with its weights, in fp32; safetensors only.

    Raises:
        FileNotFoundError: if the directory, its config or its weights are missing.
        ValueError: if a file is truncated or corrupt, or a parameter is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Opened first: its error names the missing, truncated or corrupt file in one sentence.
    stored = open_params(directory, load_architecture(directory))
    assert isinstance(stored, Stored | Dequantised)
    # Transformers would find neither remote files nor names with a prefix, and would look for the adapter
    # of such a config.
    remote = any(remote_file(path) for path in directory.glob("*.safetensors"))
    if remote or stored.is_wrapped or (directory / CONFIG).is_file():
        weights = {name: stored[name].clone() for name in stored}
        return load(directory, "cpu").with_weights(weights).requires_grad_(True)
    try:
        network, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trusted(directory),
            output_loading_info=True,
        )
    except Exception as error:  # of any of its JSON files, and of sizes that do not go together
        raise ValueError(f"{directory} cannot be loaded: {first_line(error)}") from error
    check_complete(directory, info["missing_keys"])
    name_body(network)
    return network


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint or GGUF file, with the end token as padding where it has none of its own.

    Raises:
        FileNotFoundError: if there is none in the directory.
        ValueError: if one of its files is damaged, or it has no end token.
    """
    tokenizer = gguf_tokenizer(directory) if is_gguf(directory) else _in_directory(directory)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer in {directory} has no end token (eos_token): set one and save it again"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _in_directory(directory: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted(directory))
    except Exception as error:  # the tokenizers' own errors share no base class
        pointers = [path for path in directory.glob("tokenizer*") if path.is_file() and is_lfs_pointer(path)]
        if pointers:
            raise ValueError(
                f"{pointers[0]} is a pointer of git-lfs, not the file: run git lfs pull in {directory}"
            ) from error
        for path in (path for pattern in OF_TOKENIZER for path in sorted(directory.glob(pattern))):
            if path.is_file():
                json_object(path)  # names the file if it is the one that is damaged
        raise FileNotFoundError(
            f"{directory} holds no tokenizer that can be read ({first_line(error)}):"
            " save one next to the weights"
        ) from error
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((directory / name).is_file() for name in files):  # then transformers makes up an empty one
        raise FileNotFoundError(
            f"{directory} holds no tokenizer ({' or '.join(sorted(files))}): save one next to the weights"
        )
    return tokenizer
