"""Mixtures of experts: each expert's matrices are parameters on disk, which the network holds in stacks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.models.residual import Stack
from weightgeom.params import Params


@dataclass(frozen=True, eq=False)
class Stacked(Mapping[str, Tensor]):
    """Parameters under the names that the network has for them, stacks put together when asked for."""

    params: Params
    stacks: Mapping[str, Stack]

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        if name not in self.stacks or name in self.params:  # a network's own are stacked already
            return self.params[name]
        return torch.stack([torch.cat([self.params[part] for part in one]) for one in self.stacks[name]])

    def __iter__(self) -> Iterator[str]:
        parts = {part for stack in self.stacks.values() for one in stack for part in one}
        yield from (name for name in self.params if name not in parts)
        yield from (
            name
            for name, stack in self.stacks.items()
            if all(part in self.params for one in stack for part in one)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == one for one in self)


def stacked(params: Params, stacks: Mapping[str, Stack]) -> Params:
    """The parameters as the network names them: themselves where it has no experts."""
    return Stacked(params, stacks) if stacks else params


def unstacked(weights: Mapping[str, Any], stacks: Mapping[str, Stack]) -> dict[str, Any]:
    """A network's weights under the names that a checkpoint on disk has: stacks as views of their parts."""
    parts: dict[str, Any] = {}
    for name, stack in stacks.items():
        for entry, names in zip(weights[name], stack, strict=True) if name in weights else ():
            size = len(entry) // len(names)
            parts |= {part: entry[place * size : (place + 1) * size] for place, part in enumerate(names)}
    return {name: weight for name, weight in weights.items() if name not in stacks} | parts
