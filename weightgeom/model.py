"""Language models whose weights are data: a base, a checkpoint and an edit are three values of `params`."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weightgeom.adapters import open_checkpoint
from weightgeom.experts import stacked
from weightgeom.interfaces import Params
from weightgeom.residual import Architecture, architecture_of
from weightgeom.tokens import Batch
from weightgeom.trust import trusted
from weightgeom.weights import open_params

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A network of one architecture with its tokenizer; its weights are given at every call.

    The network's own weights do not matter, and from `load` it has none. It computes on `device`.
    """

    network: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    architecture: Architecture
    device: torch.device = CPU

    def params(self, directory: Path, base: Params | None = None) -> Params:
        """The weights of a checkpoint, read lazily; those of an adapter are `base` and its low-rank update.

        Raises:
            FileNotFoundError: if there is no safetensors checkpoint in `directory`.
            ValueError: if a file of it is truncated or corrupt, or an adapter does not fit `base`.
        """
        return open_checkpoint(directory, self.architecture, base)

    def hold(self, params: Params, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights in memory, on the model's device, as `logits` wants them for many batches."""
        names = {name for name, _ in self.network.named_parameters()}
        params = stacked(params, self.architecture.stacks)
        return {name: params[name].to(self.device, dtype) for name in params if name in names}

    @property
    def size(self) -> int:
        """The bytes of its weights in fp32."""
        return 4 * sum(parameter.numel() for parameter in self.network.parameters())

    def with_weights(self, params: Params, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
        """A network of its own that has `params` for weights, for what patches or trains a network.

        Weights that are in memory, in this `dtype` and on the device, are shared and not copied.
        """
        network = _without_weights(self.network.config, self.device)
        network.load_state_dict(self.hold(params, dtype), strict=False, assign=True)
        network.tie_weights()
        return network

    def streaming(self, params: Params) -> "LanguageModel":
        """This model, to be called without weights: each module takes its own from `params` when it runs.

        They are dropped when it has run, so that no more than one module's are held, in fp32.
        """
        from accelerate.hooks import attach_align_device_hook  # noqa: PLC0415 (heavy)

        network = _without_weights(self.network.config, self.device)
        weights = _Untied(stacked(params, self.architecture.stacks), self.architecture)
        attach_align_device_hook(network, self.device, offload=True, weights_map=weights)
        return replace(self, network=network)

    @torch.no_grad()
    def logits(
        self, params: Params, batch: Batch, keep: int = 0
    ) -> Float[Tensor, "sequence kept vocabulary"]:
        """Logits at the last `keep` positions (0: all) of a network that has `params` for weights."""
        return torch.func.functional_call(
            self.network,
            dict(params),
            kwargs={
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "position_ids": batch.positions(),
                "use_cache": False,
                "logits_to_keep": keep,
            },
        ).logits

    def log_probs(self, params: Params, batch: Batch) -> Float[Tensor, "sequence predicted"]:
        """Log-probability (nats) of every token but the first, given those before it; 0 at non-targets."""
        logits = self.logits(params, batch)[:, :-1].float()
        picked = logits.gather(-1, batch.input_ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        return torch.where(batch.target[:, 1:], picked, 0.0)


@dataclass(frozen=True, eq=False)
class _Untied(Mapping[str, Tensor]):
    """Weights by every name that the network has for them, the unembedding included where it is tied."""

    params: Params
    architecture: Architecture

    def __getitem__(self, name: str) -> Tensor:
        return (
            self.architecture.unembedding(self.params)
            if name == self.architecture.unembed
            else self.params[name]
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


def kl_divergence(
    base: Float[Tensor, "sequence position vocabulary"],
    other: Float[Tensor, "sequence position vocabulary"],
    where: Bool[Tensor, "sequence position"],
) -> Float[Tensor, " token"]:
    """KL(base || other) of the predictions of two sets of logits, at the marked positions, in nats.

    In fp64, as the rounding of fp32 exceeds the KL of a small update and may be negative; in slices of
    the positions, so that no fp64 copy of all logits is held.
    """
    divergences = []
    for some, others in zip(base[where].split(256), other[where].split(256), strict=True):
        p, q = some.double().log_softmax(-1), others.double().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(divergences)


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


def _without_weights(config: "PreTrainedConfig", device: torch.device) -> "PreTrainedModel":
    """The network of a config in evaluation mode, its buffers on `device` and its parameters nowhere."""
    from accelerate import init_empty_weights  # noqa: PLC0415 (heavy)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 (heavy)

    with init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trusted(config.name_or_path or "")
        )
    network.tie_weights()
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return network.requires_grad_(False).eval()


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
    from transformers import AutoConfig  # noqa: PLC0415 (heavy)

    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: give a transformers checkpoint")
    trust = trusted(directory)
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    except (ValueError, OSError) as error:
        if not trust and "trust_remote_code" in str(error):
            raise ValueError(
                f"{path} needs code of its own: read it, and add model.trust_remote_code=true to let it run"
            ) from error
        raise ValueError(f"{path} cannot be used: {first_line(error)}") from error


def load_network(directory: Path) -> "PreTrainedModel":
    """The network of a local checkpoint with its weights, in fp32; safetensors only.

    Raises:
        FileNotFoundError: if the directory, its config or its weights are missing.
        ValueError: if a file is truncated or corrupt, or a parameter is missing.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 (heavy)
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

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
    from transformers import AutoTokenizer  # noqa: PLC0415 (heavy)

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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for use inside a sentence."""
    return next(
        (line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
