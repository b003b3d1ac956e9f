"""Checkpoints as a caller has them: a directory, a hub name, a network in memory or a state dict."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightgeom.bases.hub import fetch
from weightgeom.models.adapters import is_adapter, open_checkpoint
from weightgeom.models.experts import parts_of, unstacked
from weightgeom.models.gguf_files import is_gguf
from weightgeom.models.language_model import kept_buffers
from weightgeom.models.loading import check_complete, load_config
from weightgeom.models.quantisation import check_not_quantised
from weightgeom.models.residual import Architecture
from weightgeom.models.vocabulary import aligned
from weightgeom.models.weights import BUFFER, WRAPPERS, names_in_memory
from weightgeom.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, eq=False)
class InMemory(Mapping[str, Tensor]):
    """A caller's weights by name, each without its graph and on the CPU when it is asked for.

    The caller's tensors are neither changed nor, where they lie on the CPU, copied.
    """

    weights: Mapping[str, Any]  # tensors or NumPy arrays

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        weight = self.weights[name]
        if isinstance(weight, np.ndarray):
            return torch.from_numpy(np.require(weight, requirements=["C", "W"]))  # a copy if it has to be
        return weight.detach().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


@dataclass(frozen=True, eq=False)
class Source:
    """One checkpoint: its directory, or its weights in memory; errors call it `label`.

    A state dict, and the directory of an adapter, have no config.
    """

    label: str
    directory: Path | None = None
    weights: Mapping[str, Any] | None = None
    config: "PreTrainedConfig | None" = None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, which has no weights without its base."""
        return self.directory is not None and is_adapter(self.directory)

    def params(self, architecture: Architecture, base: Params | None = None) -> Params:
        """Its weights under the names of a checkpoint on disk; where there is a base, as it names them.

        Raises:
            FileNotFoundError: if its directory holds no safetensors.
            ValueError: if a file is corrupt, or an adapter or a vocabulary does not fit the base.
        """
        if self.directory is not None:
            return open_checkpoint(self.directory, architecture, base)
        assert self.weights is not None
        names = names_in_memory(self.weights, architecture, self.label)
        weights = unstacked({name: self.weights[key] for key, name in names.items()}, architecture.stacks)
        if architecture.tied and architecture.embed in weights:
            weights.setdefault(architecture.unembed, weights[architecture.embed])
        params = InMemory(weights)
        return params if base is None else aligned(params, base, architecture, Path(self.label))


def source_of(given: object, label: str) -> Source:
    """The checkpoint that a caller gives; fetches it if it is on the hub.

    Raises:
        FileNotFoundError: if there is no such directory and the hub does not give it either.
        TypeError: if it is of another kind, or a network without a language-model head.
        ValueError: if weights in memory are not there or not floating-point numbers.
    """
    from transformers import PreTrainedModel

    if isinstance(given, Path) and not given.expanduser().exists():
        raise FileNotFoundError(f"{label}: there is no directory {given}")
    if isinstance(given, (str, Path)):
        directory = fetch(str(given))
        if is_gguf(directory):
            raise ValueError(
                f"{label} is a GGUF file: convert it once, weightgeom.models.gguf_files.convert_gguf(FILE,"
                " DIRECTORY), and give the directory"
            )
        return Source(label, directory, config=None if is_adapter(directory) else load_config(directory))
    if isinstance(given, PreTrainedModel):
        return _of_network(given, label)
    if isinstance(given, nn.Module):
        raise TypeError(
            f"{label} is a {type(given).__name__}, which wraps a network: give the transformers network in"
            " it, such as model.module (DataParallel), model._orig_mod (torch.compile) or"
            " model.merge_and_unload() (PEFT)"
        )
    if isinstance(given, Mapping):
        return Source(label, weights=_checked({str(name): weight for name, weight in given.items()}, label))
    raise TypeError(
        f"{label} must be a directory, a hub name, a transformers network or a state dict, got"
        f" {type(given).__name__}"
    )


def plain_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The config as a checkpoint on disk has it: without the caller's choice of an attention kernel."""
    return type(config).from_dict(config.to_dict())


def check_fits(params: Params, network: nn.Module, architecture: Architecture, label: str) -> None:
    """Raise ValueError if weights lack a parameter of the config's network, or in memory have another shape.

    Of `network` only the names and shapes matter.
    """
    parts = parts_of(architecture.stacks)
    there = {parts[name].name if name in parts else name for name in params}
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    check_complete(Path(label), shapes.keys() - there)
    for name, weight in params.weights.items() if isinstance(params, InMemory) else ():
        if tuple(weight.shape) != shapes.get(name, tuple(weight.shape)):
            raise ValueError(
                f"{name} of {label} is of shape {tuple(weight.shape)}, and its config's network has it of"
                f" shape {shapes[name]}: give the config that belongs to these weights"
            )


def check_apart(before: Params, after: Params) -> None:
    """Raise ValueError if the weights of two networks in memory are the same tensors."""
    if not isinstance(after, InMemory) or not isinstance(before, InMemory):
        return
    if all(name in after and _address(before, name) == _address(after, name) for name in before):
        raise ValueError(
            "before and after are the same tensors, as training changes a network in place: keep a copy from"
            " before the training, with copy.deepcopy(network) or network.save_pretrained(directory)"
        )


def _of_network(network: "PreTrainedModel", label: str) -> Source:
    if network.get_output_embeddings() is None:
        raise TypeError(
            f"{label} is a {type(network).__name__}, which has no language-model head: load it with"
            " AutoModelForCausalLM"
        )
    named = dict(network.named_parameters(remove_duplicate=False))  # each name that a tied weight has
    buffers = dict(network.named_buffers())
    check_not_quantised(label, network.config.to_dict(), dict.fromkeys(buffers, ("", 0)))
    named |= {name: buffers[name] for name in kept_buffers(network)}
    return Source(label, weights=_checked(named, label), config=plain_config(network.config))


def _checked(weights: dict[str, Any], label: str) -> dict[str, Any]:
    kept = {name: weight for name, weight in weights.items() if not BUFFER.search(WRAPPERS.sub("", name))}
    for name, weight in kept.items():
        if not isinstance(weight, (Tensor, np.ndarray)):
            raise TypeError(
                f"{name} of {label} is a {type(weight).__name__}: a state dict holds tensors or NumPy arrays,"
                " so of a training's checkpoint give the part that holds the weights"
            )
        if isinstance(weight, Tensor) and weight.is_meta:
            raise ValueError(
                f"{name} of {label} is on the meta device, without data: load the network without device_map,"
                " or give its directory"
            )
    check_not_quantised(label, {}, {name: (str(tensor.dtype), tensor.ndim) for name, tensor in kept.items()})
    return weights


def _address(params: InMemory, name: str) -> int:
    weight = params.weights[name]
    return weight.ctypes.data if isinstance(weight, np.ndarray) else weight.data_ptr()
