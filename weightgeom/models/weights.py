"""Weights on disk: checkpoints and the difference of two, read tensor by tensor."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightgeom.models.residual import Architecture
from weightgeom.params import Params

# Old checkpoints of GPT-2, GPT-NeoX and Llama also store causal masks and rotary frequencies.
BUFFER = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, eq=False)
class Stored(Mapping[str, Tensor]):
    """Tensors in safetensors files, each a view of file pages that is mapped when it is asked for.

    `entries` gives for each name in memory the file and the tensor's name in it. A file is opened anew
    for every tensor, so that its pages leave the process's memory with the tensor.
    """

    entries: Mapping[str, tuple[Path, str]]

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        path, key = self.entries[name]
        return opened(path).get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # the inherited one would read the tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the file's header alone."""
        path, key = self.entries[name]
        return tuple(opened(path).get_slice(key).get_shape())


@dataclass(frozen=True, eq=False)
class Difference(Mapping[str, Tensor]):
    """`after` minus `before`, each tensor computed in float32 when it is asked for."""

    after: Params
    before: Params

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        return self.after[name].float() - self.before[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.after)

    def __len__(self) -> int:
        return len(self.after)

    def __contains__(self, name: object) -> bool:
        return name in self.after


def open_params(directory: Path, architecture: Architecture) -> Params:
    """The parameters of a checkpoint, read lazily and under the names that they have in memory.

    The names are those of `names_in_memory`; GPT-2 on the hub leaves out the base model's prefix.

    Raises:
        FileNotFoundError: if the directory, its safetensors or one of its shards is missing.
        ValueError: if a file is truncated or corrupt.
    """
    stored = {key: path for path in _paths(directory) for key in opened(path).keys()}
    names = names_in_memory(stored, architecture)
    return Stored({name: (stored[key], key) for key, name in names.items()})


def names_in_memory(stored: Collection[str], architecture: Architecture) -> dict[str, str]:
    """The names of parameters in memory by those that they are stored under.

    Names are translated where the disk has others, and get the base model's prefix where all of them leave
    it out. Masks and rotary frequencies are left out.
    """
    kept = [key for key in stored if not BUFFER.search(key)]
    prefix = architecture.embed.partition(".")[0] + "."
    bare = not any(key.startswith(prefix) for key in kept)

    def in_memory(key: str) -> str:
        name = architecture.aliases.get(key, key)
        return prefix + name if bare and name != architecture.unembed else name

    return {key: in_memory(key) for key in kept}


def difference(after: Params, before: Params) -> Params:
    """The update from `before` to `after`, in float32 and tensor by tensor.

    Names and shapes are compared now, from the headers alone where the weights are on disk.

    Raises:
        ValueError: if they do not agree.
    """
    names = [*after, *(name for name in before if name not in after)]
    shapes = {name: (_shape(after, name), _shape(before, name)) for name in names}
    unequal = [name for name, (new, old) in shapes.items() if new != old]
    if unequal:
        new, old = shapes[unequal[0]]
        raise ValueError(
            f"{unequal[0]} is {_in_words(new)} after and {_in_words(old)} before, and "
            f"{len(unequal) - 1} more parameters differ: take two checkpoints of one architecture"
        )
    return Difference(after, before)


def _shape(params: Params, name: str) -> tuple[int, ...] | None:
    if name not in params:
        return None
    return params.shape(name) if isinstance(params, Stored) else tuple(params[name].shape)


def _in_words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


def _paths(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint directory {directory}")
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        wanted = "safetensors is required, so save it again, or add ++model.allow_bin=true"
        hint = f", only {pickled[0]}: {wanted}" if pickled else ""
        raise FileNotFoundError(f"no {single.name} or {index.name} in {directory}{hint}")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index} is truncated or corrupt; copy or download it again") from error
    for shard in shards:
        if not (directory / shard).is_file():
            raise FileNotFoundError(f"{index} names {shard}, which is missing from {directory}")
    return [directory / shard for shard in shards]


def opened(path: Path) -> safe_open:
    """A safetensors file, mapped into memory: its tensors are views of file pages, not copies.

    Raises:
        ValueError: if it is truncated or corrupt.
    """
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt; copy or download it again ({error})") from error
