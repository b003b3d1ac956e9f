"""Passes over some layers at a time, each from the hidden states that the one before left."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightgeom.models.residual import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER = re.compile(r"(.*?)\.(\d+)\.")  # where the layers are, and which of them, in a module's name


class Walk:
    """A walk through the layers of a network, with the hidden states of all batches in front of one."""

    def __init__(self, network: "PreTrainedModel", layers: Sequence[nn.Module]) -> None:
        self.network, self.layers = network, layers
        self._states: deque[Tensor] = deque()  # by batch
        self._others: dict[int, tuple[Any, ...] | None] = {}  # outputs of a layer other than hidden states

    @classmethod
    def through(cls, network: "PreTrainedModel", sites: Sequence[Site]) -> "Walk | None":
        """The walk over these sites; None where they are not, in order, in one list of layers.

        The final norm, which comes last, is behind the list.
        """
        of_layers = [site for site in sites if site.name != "final_input"]
        matches = [LAYER.match(site.module) for site in of_layers]
        places = [(match[1], int(match[2])) for match in matches if match is not None]
        one_list = len({place for place, _ in places}) == 1 and len(places) == len(of_layers)
        if not one_list or places != sorted(places):
            return None
        layers = network.get_submodule(places[0][0])
        return cls(network, list(layers)) if isinstance(layers, nn.ModuleList) else None

    @contextmanager
    def part(self, first: Site, following: Site | None, arrived: Callable[[Site], None]) -> Iterator[None]:
        """Within it, passes start at the layer of `first`, and those in front are left out.

        With the site at which the next part starts, the hidden states there are kept, and `arrived` is called
        with it. Take the batches in the same order in every part.
        """
        start, taken = layer_of(first), deque[Tensor]()

        def give(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            state = self._states.popleft()
            return ((state, *args[1:]), named) if args else (args, {**named, "hidden_states": state})

        def take(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            taken.append(_hidden(args, named).clone())  # some layers add to it in place
            if following is not None:
                arrived(following)

        with ExitStack() as stack:
            if self._states:
                stack.enter_context(_without_embedding(self.network))
                for index in range(start):
                    stack.enter_context(_left_out(self.layers[index], self._others[index]))
                hook = self.layers[start].register_forward_pre_hook(give, with_kwargs=True)
                stack.callback(hook.remove)
            if following is not None:
                for index in range(start, layer_of(following)):
                    hook = self.layers[index].register_forward_hook(self._noting(index))
                    stack.callback(hook.remove)
                hook = self.layers[layer_of(following)].register_forward_pre_hook(take, with_kwargs=True)
                stack.callback(hook.remove)
            yield
        self._states = taken

    def _noting(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._others[index] = output[1:] if isinstance(output, tuple) else None

        return note


def layer_of(site: Site) -> int:
    """The layer's place in the list of layers."""
    match = LAYER.match(site.module)
    return site.layer if match is None else int(match[2])


def _hidden(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return args[0] if args else named["hidden_states"]


@contextmanager
def _without_embedding(network: "PreTrainedModel") -> Iterator[None]:
    """Within it, the embedding gives zeros, and its weight is not read."""
    embedding = network.get_input_embeddings()
    assert isinstance(embedding.weight, Tensor)
    name = next(name for name, module in network.named_modules() if module is embedding)
    network.set_submodule(name, _Zeros(embedding.weight))
    try:
        yield
    finally:
        network.set_submodule(name, embedding)


class _Zeros(nn.Module):
    """Stands for an embedding whose output is replaced."""

    weight: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", like.new_zeros(()).expand(like.shape), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.weight.shape[1], dtype=self.weight.dtype, device=ids.device)


@contextmanager
def _left_out(layer: nn.Module, others: tuple[Any, ...] | None) -> Iterator[None]:
    """Within it, a layer returns the hidden states that it is given."""

    def forward(*args: Any, **named: Any) -> Any:
        hidden = _hidden(args, named)
        return hidden if others is None else (hidden, *others)

    own = vars(layer).get("forward")  # accelerate sets one
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
