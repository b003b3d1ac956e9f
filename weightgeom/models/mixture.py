"""The residual map of a mixture of experts, given the names of its modules."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from weightgeom.models.experts import Stack, names_on_disk
from weightgeom.models.residual import ATTENTION, Architecture, Kind, ResidualMatrix, input_sites, module_path

KINDS: tuple[Kind, ...] = ("gate", "up", "down")
SHARED: tuple[Kind, ...] = ("shared_gate", "shared_up", "shared_down")


@dataclass(frozen=True)
class Mixture:
    """The module names of a mixture within a layer, and how it stores its experts; Qwen3's are the defaults.

    `block` has the router and the experts in it, and the expert that all tokens share where `shared` names
    it. Of an expert's entries in the network's stacks, gate and up are `interleaved` row by row instead of
    one below the other, and all are `transposed` where they are stored as (d_in, d_out).
    """

    experts: int
    block: str = "mlp"
    router: str = "gate"
    shared: str | None = None
    transposed: bool = False
    interleaved: bool = False


def with_experts(
    dense: Architecture, model_type: str, mixture: Mixture, sparse: Callable[[int], bool] = lambda layer: True
) -> Architecture:
    """A decoder with a router and experts for an MLP in the layers that are `sparse`."""
    matrices: list[ResidualMatrix] = []
    stacks: dict[str, Stack] = {}
    names: list[str] = []
    for layer in range(dense.n_layers):
        of_layer = [matrix for matrix in dense.matrices if matrix.layer == layer]
        if not sparse(layer):
            matrices += of_layer
            continue
        block = f"{module_path(dense, layer)}.{mixture.block}"
        router = ResidualMatrix(layer, "router", f"{block}.{mixture.router}")
        matrices += [*(matrix for matrix in of_layer if matrix.kind in ATTENTION), router]
        matrices += [
            ResidualMatrix(layer, kind, f"{block}.experts.{expert}.{kind}_proj", expert=expert)
            for expert in range(mixture.experts)
            for kind in KINDS
        ]
        if mixture.shared is not None:
            shared = [
                ResidualMatrix(layer, kind, f"{block}.{mixture.shared}.{of_expert}_proj")
                for kind, of_expert in zip(SHARED, KINDS, strict=True)
            ]
            matrices += shared
            names += [matrix.parameter for matrix in shared]
        names.append(router.parameter)
        for name, kinds in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
            parts = tuple(
                tuple(f"{block}.experts.{expert}.{kind}_proj.weight" for kind in kinds)
                for expert in range(mixture.experts)
            )
            stacks[f"{block}.experts.{name}"] = Stack(
                parts, mixture.transposed, mixture.interleaved and len(kinds) > 1
            )
    return replace(
        dense,
        matrices=tuple(matrices),
        sites=input_sites(matrices),
        stacks=stacks,
        aliases={**dense.aliases, **names_on_disk(model_type, names, stacks)},
    )
