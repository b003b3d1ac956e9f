"""Loading of networks, tokenizers and configs from a checkpoint directory."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weightgeom.models.experts import stacked
from weightgeom.models.language_model import LanguageModel, _without_weights, trusted
from weightgeom.models.residual import Architecture, architecture_of
from weightgeom.models.weights import open_params
from weightgeom.text.files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    network = _without_weights(load_config(directory), torch.device(device))
    names = set(stacked(stored, architecture.stacks))
    check_complete(directory, {name for name, _ in network.named_parameters()} - names)
    return LanguageModel(network, load_tokenizer(directory), architecture, torch.device(device))


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


def load_context(directory: Path) -> int | None:
    """The longest sequence, in tokens, that a checkpoint's config names; None if it names none."""
    return getattr(load_config(directory), "max_position_embeddings", None)


def load_architecture(directory: Path) -> Architecture:
    """The residual-stream map that a checkpoint's config asks for; reads no weights."""
    return architecture_of(load_config(directory))


def load_config(directory: Path) -> "PreTrainedConfig":
    """The config of a checkpoint directory; its own code runs only if it is trusted.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read, or needs code that is not trusted.
    """
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: give a transformers checkpoint")
    trust = trusted(directory)
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    except (ValueError, OSError) as error:
        if not trust and "trust_remote_code" in str(error):
            raise ValueError(
                f"{path} needs code of its own: read it, and add ++model.trust_remote_code=true to let it run"
            ) from error
        raise ValueError(f"{path} cannot be used: {first_line(error)}") from error


def load_network(directory: Path) -> "PreTrainedModel":
    """The network of a local checkpoint with its weights, in fp32; safetensors only.

    Raises:
        FileNotFoundError: if the directory, its config or its weights are missing.
        ValueError: if a file is truncated or corrupt, or a parameter is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Opened first: it says in one sentence what is missing, truncated or corrupt.
    open_params(directory, load_architecture(directory))
    network, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        directory,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=trusted(directory),
        output_loading_info=True,
    )
    check_complete(directory, info["missing_keys"])
    return network


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint, with the end token as padding where it has none of its own.

    Raises:
        FileNotFoundError: if there is none in the directory.
        ValueError: if it has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted(directory))
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"{directory} holds no tokenizer that can be read ({first_line(error)}):"
            " save one beside the weights"
        ) from error
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((directory / name).is_file() for name in files):  # then transformers makes up an empty one
        raise FileNotFoundError(
            f"{directory} holds no tokenizer ({' or '.join(sorted(files))}): save one beside the weights"
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer in {directory} has no end token (eos_token): set one and save it again"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
