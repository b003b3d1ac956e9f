"""LoRA training of a frozen network: the adapter's configuration, and the adapted weights."""

from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from weightgeom.models.adapters import Adapted, LowRank
from weightgeom.models.residual import Architecture
from weightgeom.params import Params

if TYPE_CHECKING:
    from peft import LoraConfig

BASE_LAYER = ".base_layer."  # inserted by PEFT into the names of adapted weights


@dataclass(frozen=True)
class Lora:
    """W + alpha / r · B A with W frozen, A random and B = 0 at first; disabled without a rank `r`.

    `targets` are the last name parts of modules that read or write the residual stream; by default all of
    them are adapted. `dropout` applies to the input of A. Source: arXiv:2106.09685, eq. 3.
    """

    r: int | None = Field(default=None, ge=1)
    alpha: float = Field(default=32, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | None = Field(default=None, min_length=1)

    def check(self, architecture: Architecture) -> None:
        """Raise ValueError for a target that is not a module of the residual stream."""
        names = _module_names(architecture)
        unknown = [target for target in self.targets or [] if target not in names]
        if unknown:
            raise ValueError(
                f"unknown module {unknown[0]!r} in training.lora.targets; choose from {', '.join(names)}"
            )

    def config(self, architecture: Architecture) -> "LoraConfig":
        """The PEFT configuration for a network of this architecture."""
        from peft import LoraConfig

        assert self.r is not None
        self.check(architecture)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] (PEFT's hint is int; it only divides)
            lora_dropout=self.dropout,
            target_modules=self.targets or _module_names(architecture),
            fan_in_fan_out=any(matrix.transposed for matrix in architecture.matrices),
            bias="none",
            task_type="CAUSAL_LM",
        )


def _module_names(architecture: Architecture) -> list[str]:
    return sorted({matrix.module.rpartition(".")[2] for matrix in architecture.matrices if matrix.is_layer})


def current_weights(network: nn.Module, architecture: Architecture) -> Params:
    """The effective weights of `network`, by their names without an adapter.

    An adapter in training is added to the frozen weights; its factors are multiplied only on access.
    """
    named = {name: weight for name, weight in network.named_parameters() if ".lora_" not in name}
    base = {name.replace(BASE_LAYER, "."): weight for name, weight in named.items()}
    if base.keys() == named.keys():
        return base
    modules: dict[str, Any] = dict(network.named_modules())
    updates = {}
    for name in base.keys() - named.keys():
        module = modules[name.removesuffix(".weight")] if name.endswith(".weight") else None
        if module is not None:
            a, b = (factor["default"].weight.detach() for factor in (module.lora_A, module.lora_B))
            updates[name] = LowRank(module.scaling["default"] * b, a)
    transposed = frozenset(matrix.parameter for matrix in architecture.matrices if matrix.transposed)
    return Adapted(base, updates, {}, transposed)
