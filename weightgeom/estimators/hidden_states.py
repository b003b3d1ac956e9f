"""The residual stream behind a layer at the last token of prompts, and the logits that follow from it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.estimators.lm_head import logits_of
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Architecture, Site, module_path
from weightgeom.text.tokens import Batch, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZE = 64  # prompts that go through the network at once


@torch.no_grad()
def last_states(
    model: LanguageModel, network: "PreTrainedModel", texts: Sequence[str], layers: Sequence[int]
) -> dict[int, Float[Tensor, "prompt d"]]:
    """The stream behind every one of these layers at the last token of every prompt, padding not counted.

    Raises:
        ValueError: if a state is not finite.
    """
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(texts), SIZE):
        batch = prompts(texts[start : start + SIZE], model.tokenizer).to(model.device)
        for layer, output in _outputs(model.architecture, network, batch, layers).items():
            parts[layer].append(_stream(output)[batch.target].cpu())
    states = {layer: torch.cat(of_layer) for layer, of_layer in parts.items()}
    for layer, state in states.items():
        if not bool(state.isfinite().all()):
            raise ValueError(f"a state behind layer {layer} is not finite: the weights have diverged")
    return states


@torch.no_grad()
def last_inputs(
    model: LanguageModel, network: "PreTrainedModel", texts: Sequence[str], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "prompt d"]]:
    """The input at every one of these sites at the last token of every prompt, padding not counted.

    Raises:
        ValueError: if an input is not finite.
    """
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(texts), SIZE):
        batch = prompts(texts[start : start + SIZE], model.tokenizer).to(model.device)

        def keep(
            site: Site, module: torch.nn.Module, inputs: tuple[Tensor, ...], batch: Batch = batch
        ) -> None:
            rows = inputs[0].reshape(*batch.target.shape, -1)  # OPT's MLP is given them flattened
            parts[site].append(rows[batch.target].float().cpu())

        hooks = [
            network.get_submodule(site.module).register_forward_pre_hook(partial(keep, site))
            for site in sites
        ]
        try:
            _hidden(network, batch)
        finally:
            for handle in hooks:
                handle.remove()
    states = {site: torch.cat(of_site) for site, of_site in parts.items()}
    for site, state in states.items():
        if not bool(state.isfinite().all()):
            raise ValueError(
                f"the {site.name} of layer {site.layer} is not finite: the weights have diverged"
            )
    return states


@dataclass(frozen=True, eq=False)
class Tail:
    """The network from behind a layer on, for a batch of prompts whose last states may change."""

    architecture: Architecture
    network: "PreTrainedModel"
    layer: int
    batch: Batch
    output: Any  # of the layer, as it comes

    @classmethod
    def of(cls, model: LanguageModel, network: "PreTrainedModel", texts: Sequence[str], layer: int) -> "Tail":
        """The tail of these prompts; runs the network once."""
        return cls.of_batch(model, network, prompts(texts, model.tokenizer).to(model.device), layer)

    @classmethod
    def of_batch(cls, model: LanguageModel, network: "PreTrainedModel", batch: Batch, layer: int) -> "Tail":
        """The tail of a batch whose targets are the last tokens of its prompts; runs the network once."""
        with torch.no_grad():
            output = _outputs(model.architecture, network, batch, [layer])[layer]
        return cls(model.architecture, network, layer, batch, output)

    @property
    def states(self) -> Float[Tensor, "prompt d"]:
        """The states of the unchanged model."""
        return _stream(self.output)[self.batch.target]

    def __call__(self, states: Float[Tensor, "prompt d"]) -> Float[Tensor, "prompt vocabulary"]:
        """The logits behind the last token of every prompt, its state being replaced; in float32."""
        return logits_of(self.network, self._hidden(states)[self.batch.target]).float()

    def logits(
        self, added: Float[Tensor, "prompt d"], last: Sequence[int], places: int
    ) -> Float[Tensor, "prompt place vocabulary"]:
        """The logits from each prompt's last place on, with its state shifted; in float32."""
        hidden = self._hidden(self.states + added.to(self.states))
        first, end = torch.tensor(last, device=hidden.device), hidden.shape[1] - 1
        where = (first[:, None] + torch.arange(places, device=hidden.device)).clamp(max=end)
        wanted = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[2]))
        return logits_of(self.network, wanted.flatten(0, 1)).float().unflatten(0, where.shape)

    def _hidden(self, states: Float[Tensor, "prompt d"]) -> Float[Tensor, "prompt position d"]:
        stream = _stream(self.output).clone()
        stream[self.batch.target] = states.to(stream)
        replaced = (stream, *self.output[1:]) if isinstance(self.output, tuple) else stream
        with _replaced(self.architecture, self.network, self.layer, replaced):
            return _hidden(self.network, self.batch)


def check_layers(layers: Sequence[int] | None, architecture: Architecture) -> None:
    """Raise ValueError for a layer that the model does not have."""
    if bad := [layer for layer in layers or () if not 0 <= layer < architecture.n_layers]:
        raise ValueError(f"there is no layer {bad[0]}: the model has layers 0 to {architecture.n_layers - 1}")


def _hidden(network: "PreTrainedModel", batch: Batch) -> Float[Tensor, "prompt position d"]:
    return network.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions(),
        use_cache=False,
    ).last_hidden_state


def _stream(output: Any) -> Float[Tensor, "prompt position d"]:
    return output[0] if isinstance(output, tuple) else output


def _outputs(
    architecture: Architecture, network: "PreTrainedModel", batch: Batch, layers: Sequence[int]
) -> dict[int, Any]:
    outputs: dict[int, Any] = {}

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, given, output: outputs.__setitem__(layer, output)

    hooks = [
        network.get_submodule(module_path(architecture, layer)).register_forward_hook(hook(layer))
        for layer in layers
    ]
    try:
        _hidden(network, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return outputs


@contextmanager
def _replaced(
    architecture: Architecture, network: "PreTrainedModel", layer: int, output: Any
) -> Iterator[None]:
    """Within it the layers up to this one do not run; it puts out `output`."""
    modules = [network.get_submodule(module_path(architecture, index)) for index in range(layer + 1)]
    for module in modules:
        module.forward = lambda *given, **named: output
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # which uncovers that of its class
