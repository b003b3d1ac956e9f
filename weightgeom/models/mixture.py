"""The residual map of a mixture of experts, given the names of its modules."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weightgeom.models.experts import Stack, names_on_disk
from weightgeom.models.residual import Architecture, Kind, ResidualMatrix, input_sites, module_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARED: dict[Kind, Kind] = {"gate": "shared_gate", "up": "shared_up", "down": "shared_down"}


@dataclass(frozen=True)
class Mixture:
    """The module names of a mixture within a layer, and how it stores its experts; Qwen3's are the defaults.

    `block` has the router and the experts in it, and the expert that all tokens share where `shared` names
    it; where `shared_router` names one, its one row weights the shared expert. Experts that are not `gated`
    have an up and a down alone. Of an expert's entries in the network's stacks, gate and up are `interleaved`
    row by row instead of one below the other, and all are `transposed` where they are stored as
    (d_in, d_out).
    """

    experts: int
    block: str = "mlp"
    router: str = "gate"
    shared: str | None = None
    shared_router: str | None = None
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False


def with_experts(
    dense: Architecture, model_type: str, mixture: Mixture, sparse: Callable[[int], bool] = lambda layer: True
) -> Architecture:
    """A decoder with a router and experts for an MLP in the layers that are `sparse`."""
    matrices: list[ResidualMatrix] = []
    stacks: dict[str, Stack] = {}
    names: list[str] = []
    kinds: tuple[Kind, ...] = ("gate", "up", "down") if mixture.gated else ("up", "down")
    entries = {"_".join(kinds[:-1]) + "_proj": kinds[:-1], "down_proj": kinds[-1:]}
    for layer in range(dense.n_layers):
        of_layer = [matrix for matrix in dense.matrices if matrix.layer == layer]
        if not sparse(layer):
            matrices += of_layer
            continue
        block = f"{module_path(dense, layer)}.{mixture.block}"
        router = ResidualMatrix(layer, "router", f"{block}.{mixture.router}")
        matrices += [*(matrix for matrix in of_layer if matrix.block != "mlp"), router]
        matrices += [
            ResidualMatrix(layer, kind, f"{block}.experts.{expert}.{kind}_proj", expert=expert)
            for expert in range(mixture.experts)
            for kind in kinds
        ]
        if mixture.shared is not None:
            shared = [
                ResidualMatrix(layer, SHARED[kind], f"{block}.{mixture.shared}.{kind}_proj") for kind in kinds
            ]
            if mixture.shared_router is not None:
                shared.append(ResidualMatrix(layer, "shared_router", f"{block}.{mixture.shared_router}"))
            matrices += shared
            names += [matrix.parameter for matrix in shared]
        names.append(router.parameter)
        for name, together in entries.items():
            parts = tuple(
                tuple(f"{block}.experts.{expert}.{kind}_proj.weight" for kind in together)
                for expert in range(mixture.experts)
            )
            stacks[f"{block}.experts.{name}"] = Stack(
                parts, mixture.transposed, mixture.interleaved and len(together) > 1
            )
    return replace(
        dense,
        matrices=tuple(matrices),
        sites=input_sites(matrices),
        stacks=stacks,
        aliases={**dense.aliases, **names_on_disk(model_type, names, stacks)},
    )


def is_sparse(config: "PreTrainedConfig", layer: int) -> bool:
    """Whether a layer has experts, by the names of Qwen's configs."""
    step = config.decoder_sparse_step
    return layer not in (config.mlp_only_layers or []) and config.num_experts > 0 and (layer + 1) % step == 0
