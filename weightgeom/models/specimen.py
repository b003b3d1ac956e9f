"""A small random network with its residual map, and the flow through its modules."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from weightgeom.models.experts import stacked, unstacked
from weightgeom.models.residual import Architecture, Kind, ResidualMatrix, architecture_of
from weightgeom.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Flow:
    """One forward pass: the inputs and outputs of the modules, row by row, and the logits.

    A row is a token, but in modules within attention, where it is a head of a token.
    """

    inputs: Mapping[str, Float[Tensor, "_ _"]]
    outputs: Mapping[str, Float[Tensor, "_ _"]]
    logits: Float[Tensor, "token vocabulary"]


@dataclass(frozen=True, eq=False)
class Specimen:
    """A random network in float64, the map to be checked on it, and its parameters by the map's names."""

    network: "PreTrainedModel"
    architecture: Architecture
    params: Params

    @classmethod
    def of(cls, config: "PreTrainedConfig", architecture: Architecture | None = None) -> "Specimen":
        """A network of a config with the map of its type, or with another one."""
        from transformers import AutoModelForCausalLM

        architecture = architecture or architecture_of(config)
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # in float64 as well
        network = AutoModelForCausalLM.from_config(config, **eager).double().eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise + 1 if is_gain else noise)
        params = unstacked(dict(network.named_parameters()), architecture.stacks)
        return cls(network, architecture, params)

    def run(self, params: Params | None = None, changes: Mapping[str, Change] | None = None) -> Flow:
        """A forward pass with `params` for weights and changes of the outputs of modules."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(
                partial(_record, name, inputs, outputs, (changes or {}).get(name)), with_kwargs=True
            )
            for name, module in self.network.named_modules()
        ]
        weights = stacked(params or self.params, self.architecture.stacks)
        try:
            given = {"input_ids": TOKENS, "use_cache": False}
            logits = functional_call(self.network, dict(weights), kwargs=given).logits
        finally:
            for hook in hooks:
                hook.remove()
        return Flow(inputs, outputs, _in_rows(logits))

    @cached_property
    def flow(self) -> Flow:
        """The forward pass of the unchanged network."""
        return self.run()

    @cached_property
    def unbiased(self) -> Params:
        """The parameters with all biases at zero."""
        return {
            name: torch.zeros_like(parameter) if name.endswith("bias") else parameter
            for name, parameter in self.params.items()
        }

    def of_kind(self, *kinds: Kind) -> Iterator[ResidualMatrix]:
        """The matrices of these kinds, in all layers, that are no experts."""
        return (m for m in self.architecture.matrices if m.kind in kinds and m.expert is None)

    def matrix(self, layer: int, *kinds: Kind) -> ResidualMatrix:
        """The first matrix of these kinds in a layer, which is no expert."""
        return next(matrix for matrix in self.of_kind(*kinds) if matrix.layer == layer)

    def site(self, layer: int, name: str) -> str:
        """The module whose input is a site of a layer."""
        sites = self.architecture.sites
        return next(site.module for site in sites if (site.layer, site.name) == (layer, name))

    def experts(self) -> Iterator[tuple[ResidualMatrix, dict[Kind, ResidualMatrix]]]:
        """Every expert: the router of its layer, and its own matrices by kind."""
        for router in self.of_kind("router"):
            of_layer = [m for m in self.architecture.matrices if m.layer == router.layer]
            for expert in sorted({m.expert for m in of_layer if m.expert is not None}):
                yield router, {m.kind: m for m in of_layer if m.expert == expert}


def _record(
    name: str,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    change: Change | None,
    module: nn.Module,
    given: tuple[Any, ...],
    named: dict[str, Any],
    output: Any,
) -> Any:
    """A hook that keeps the input and the output of a module, and changes the output."""
    hidden = given[0] if given else named.get("hidden_states")
    result = output[0] if isinstance(output, tuple) else output
    if isinstance(hidden, Tensor) and hidden.is_floating_point():
        inputs[name] = _in_rows(hidden)
    if not isinstance(result, Tensor) or not result.is_floating_point():  # rotary ones may be complex
        return None
    if change is not None:
        result = change(_in_rows(result)).reshape(result.shape)
    outputs[name] = _in_rows(result).clone()  # which some blocks go on adding to in place
    if change is None:
        return None
    return (result, *output[1:]) if isinstance(output, tuple) else result


def _in_rows(hidden: Float[Tensor, "*row d"]) -> Float[Tensor, "_ d"]:
    return hidden.reshape(-1, hidden.shape[-1])
