"""Mixtures of experts: the matrices of each expert are parameters, which the network holds in stacks."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightgeom.params import Params


@dataclass(frozen=True)
class Stack:
    """A tensor of the network with an entry for each expert of a layer.

    `parts` names the parameters of each expert, whose rows make up the entry: one below the other, or in
    turns where they are `interleaved`. Entries that are `transposed` are stored as (d_in, d_out).
    """

    parts: tuple[tuple[str, ...], ...]
    transposed: bool = False
    interleaved: bool = False

    def apart(self, entry: Any, place: int) -> Any:
        """One part of an expert's entry, (d_out, d_in), as a view; of a tensor or a NumPy array."""
        rows, number = entry.T if self.transposed else entry, len(self.parts[0])
        size = len(rows) // number
        return rows[place::number] if self.interleaved else rows[place * size : (place + 1) * size]

    def together(self, parts: Sequence[Float[Tensor, "size d_in"]]) -> Float[Tensor, "_ _"]:
        """An expert's entry of its parts."""
        rows = torch.stack([*parts], 1).flatten(0, 1) if self.interleaved else torch.cat([*parts])
        return rows.T if self.transposed else rows


@dataclass(frozen=True)
class Part:
    """Where a stack holds a parameter: the stack and its name, the expert, and the place in its entry."""

    stack: Stack
    name: str
    expert: int
    place: int

    def of(self, whole: Any) -> Any:
        """The parameter, as a view of its stack."""
        return self.stack.apart(whole[self.expert], self.place)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, by that of its stack."""
        rows, columns = whole[:0:-1] if self.stack.transposed else whole[1:]
        return rows // len(self.stack.parts[0]), columns


def parts_of(stacks: Mapping[str, Stack]) -> dict[str, Part]:
    """By its name, where every parameter that lies in a stack is."""
    return {
        part: Part(stack, name, expert, place)
        for name, stack in stacks.items()
        for expert, names in enumerate(stack.parts)
        for place, part in enumerate(names)
    }


@dataclass(frozen=True, eq=False)
class Stacked(Mapping[str, Tensor]):
    """Parameters under the names that the network has for them, stacks put together when asked for."""

    params: Params
    stacks: Mapping[str, Stack]

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        if name not in self.stacks or name in self.params:  # a network's own are stacked already
            return self.params[name]
        stack = self.stacks[name]
        return torch.stack([stack.together([self.params[part] for part in parts]) for parts in stack.parts])

    def __iter__(self) -> Iterator[str]:
        parts = {part for stack in self.stacks.values() for names in stack.parts for part in names}
        yield from (name for name in self.params if name not in parts)
        yield from (
            name
            for name, stack in self.stacks.items()
            if all(part in self.params for names in stack.parts for part in names)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)


def stacked(params: Params, stacks: Mapping[str, Stack]) -> Params:
    """The parameters as the network names them: themselves where it has no experts."""
    return Stacked(params, stacks) if stacks else params


def unstacked(weights: Mapping[str, Any], stacks: Mapping[str, Stack]) -> dict[str, Any]:
    """A network's weights with each expert's parameters apart, as views of their stacks."""
    parts = {
        name: part.of(weights[part.name]) for name, part in parts_of(stacks).items() if part.name in weights
    }
    return {name: weight for name, weight in weights.items() if name not in stacks} | parts


def routed_rows(
    inputs: Sequence[Tensor], experts: int
) -> tuple[Float[Tensor, "row d"], Int[Tensor, " row"], Int[Tensor, "row choice"]]:
    """The rows that the experts of a layer read, the token of each, and the experts that read it.

    `inputs` are those of the module that all experts are in: in transformers the tokens' inputs, the experts
    chosen for each token and their weights; or, of Llama 4, the inputs of all tokens for the first expert,
    for the second and so on, each times the router's score, which is 0 where the expert is not chosen.

    Raises:
        NotImplementedError: for inputs of another form.
    """
    a = inputs[0].detach().flatten(0, -2)
    if len(inputs) == 3 and not inputs[1].is_floating_point():
        return a, torch.arange(len(a), device=a.device), inputs[1].reshape(len(a), -1)
    if len(inputs) == 1 and len(a) % experts == 0:
        by_expert = a.unflatten(0, (experts, -1))
        expert, token = by_expert.any(-1).nonzero(as_tuple=True)
        return by_expert[expert, token], token, expert[:, None]
    raise NotImplementedError(
        f"the experts of this model are called with {len(inputs)} inputs of an unknown form, which do not"
        " say which tokens go to which expert: leave the probe rsf out, with probe=[spectrum,behaviour]"
    )


def names_on_disk(model_type: str, names: Collection[str], stacks: Mapping[str, Stack]) -> dict[str, str]:
    """Parameters that the disk has under other names, by these: the parts of stacks, and `names`.

    The names are those of transformers' own conversion map. A type whose stacks it leaves as they are has
    them on disk as well, where `open_params` takes them apart.

    Raises:
        NotImplementedError: if the map makes a stack in a way that is not known here.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_checkpoint_conversion_mapping(model_type) or []
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    on_disk = {name: name for name in names}  # by ours, that on disk
    for name, stack in stacks.items():
        for converter in converters:
            (target,) = converter.target_patterns
            if not name.endswith(target):
                continue
            operations = [type(operation).__name__ for operation in converter.operations]
            sources = converter.source_patterns
            if operations != ["MergeModulelist", "Concatenate"][: len(sources)] or stack.transposed:
                raise NotImplementedError(f"no way to read {name} of {model_type!r}, made by {operations}")
            for expert, parts in enumerate(stack.parts):
                for part, source in zip(parts, sources, strict=True):
                    on_disk[part] = name.removesuffix(target) + source.replace("*", str(expert))
    for renaming in reversed(renamings):
        back = renaming.reverse_transform()
        on_disk = {ours: back.rename_source_key(theirs)[0] for ours, theirs in on_disk.items()}
    return {theirs: ours for ours, theirs in on_disk.items() if theirs != ours}
