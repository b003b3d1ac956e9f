"""The processes of one training, seen from inside it: their number, and values that they exchange.

Outside a training on several processes there is one, and every function here returns its argument.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
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

    All processes must call it; the others get none of the weights. The weights lie in files without a name
    on the file system of `directory`, since the first process need not have the memory for them.
    """
    if not is_sharded(network):
        return None
    gathered: dict[int, Tensor] = {}  # by identity, which tied weights share
    weights = network.state_dict(keep_vars=True)
    for weight in weights.values():
        if id(weight) not in gathered:
            tensor = whole(weight)
            gathered[id(weight)] = _on_disk(tensor, directory) if is_first() else tensor.new_empty(0)
    return {name: gathered[id(weight)] for name, weight in weights.items()}


def _on_disk(tensor: Tensor, directory: Path) -> Tensor:
    if not tensor.numel():
        return tensor
    with NamedTemporaryFile(dir=directory) as file:
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_part(weight: Tensor) -> bool:
    if not _several():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)
