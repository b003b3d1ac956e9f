"""The processes of one training, seen from inside it: their number, and values that they exchange.

Outside a training on several processes there is one, and every function here returns its argument.
"""

import os
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def processes() -> int:
    """The number of processes of this training."""
    return torch.distributed.get_world_size() if _several() else 1


def is_first() -> bool:
    """Whether this process writes: the first one, or the only one."""
    return not _several() or torch.distributed.get_rank() == 0


def from_first(work: Callable[[], T]) -> T:
    """The result of `work` in the first process, in all of them; the others wait for it."""
    if not _several():
        return work()
    result = [work() if is_first() else None]
    torch.distributed.broadcast_object_list(result)
    return result[0]  # pyright: ignore[reportReturnType]


def of_all(value: T) -> list[T]:
    """The values of all processes, in all of them."""
    if not _several():
        return [value]
    values: list[T | None] = [None] * processes()
    torch.distributed.all_gather_object(values, value)
    return values  # pyright: ignore[reportReturnType]


def is_sharded(network: nn.Module) -> bool:
    """Whether each process holds a part of every weight."""
    return any(_is_part(weight) for weight in network.parameters())


def part(weight: Tensor) -> Tensor:
    """The part of a weight, or of its gradient, that this process holds."""
    return weight.to_local() if _is_part(weight) else weight  # pyright: ignore[reportAttributeAccessIssue]


def whole(weight: Tensor) -> Tensor:
    """A weight, or its gradient, gathered from the parts; all processes must call it."""
    return weight.full_tensor() if _is_part(weight) else weight  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def gathered_weights(network: nn.Module, directory: Path) -> dict[str, Tensor] | None:
    """The whole weights of a sharded network in the first process; None if it is not sharded.

    All processes must call it; the others get none of the weights. The weights lie in a file without a name
    on the file system of `directory`, since the first process need not have the memory for them.
    """
    if not is_sharded(network):
        return None
    weights = network.state_dict(keep_vars=True)
    distinct = {id(weight): weight for weight in weights.values()}  # tied weights are one
    room = _on_disk(sum(map(_size, distinct.values())), directory) if is_first() else None
    gathered: dict[int, Tensor] = {}
    offset = 0
    for identity, weight in distinct.items():
        tensor = whole(weight)
        if room is None:
            continue
        gathered[identity] = tensor
        if tensor.numel():
            place = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            gathered[identity] = place.view(tensor.shape).copy_(tensor)
            offset += _size(tensor)
    return {name: gathered[id(weight)] for name, weight in weights.items() if id(weight) in gathered}


def _size(weight: Tensor) -> int:
    """The bytes of a weight, those of a sharded one together, up to the next multiple of 64."""
    return -(-weight.numel() * weight.element_size() // 64) * 64


def _on_disk(size: int, directory: Path) -> mmap:
    """A mapping of `size` bytes, backed by a temporary file in `directory` that has no name.

    Raises:
        OSError: if the disk is full.
    """
    with TemporaryFile(dir=directory) as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # so that a full disk is an error, and no signal that kills
            os.posix_fallocate(file.fileno(), 0, size)
        return mmap(file.fileno(), size)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_part(weight: Tensor) -> bool:
    if not _several():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)
