"""Optimizers of a training, and the ones that transformers lacks: Lion, and Muon with AdamW for the rest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weightgeom.models.residual import Architecture

Name = Literal["adamw", "sgd", "muon", "lion"]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer as far as measurements and plans depend on it."""

    forecast: str  # of the probe `moments`: the quantity that stands for its update; "" for none
    moments: int  # tensors that it keeps for each trained one, at most
    orthogonal: bool = False  # its updates of matrices have singular values of nearly one size
    transformers: str = ""  # its name among the `optim` of transformers


OPTIMIZERS: Mapping[Name, Optimizer] = {
    "adamw": Optimizer("forecast_adam_ratio", 2, transformers="adamw_torch_fused"),
    "sgd": Optimizer("forecast_ratio", 0, transformers="sgd"),
    "muon": Optimizer("", 2, orthogonal=True),
    "lion": Optimizer("forecast_adam_ratio", 1),  # the sign of a momentum: the limit of Adam's division
}


class Lion(torch.optim.Optimizer):
    """θ ← θ - lr (sign(0.9 m + 0.1 g) + λ θ), then m ← 0.99 m + 0.01 g; m is 0 at first.

    `groups` have `params` and `weight_decay`. Source: arXiv:2302.06675, Program 1, with its default betas.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; mutates the parameters and the momenta."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            now, later = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(torch.lerp(weight.grad, momentum, now).sign_(), alpha=-group["lr"])
                momentum.lerp_(weight.grad, 1 - later)
        return loss


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for some matrices, and its AdamW for all other parameters, under one learning rate.

    Muon's rate is scaled by 0.2 √max(rows, columns), which gives its updates the root mean square of AdamW's,
    so that the rate of AdamW serves. `groups` have `params` and `weight_decay`, `matrices` are those of
    Muon. All state is in this optimizer, which lends it to the two. Source: torch.optim.Muon; the scale is
    that of arXiv:2502.16982, 2.2.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, matrices: Iterable[Tensor]) -> None:
        ids = {id(matrix) for matrix in matrices}
        groups = list(groups)

        def part(of_muon: bool) -> list[dict[str, Any]]:
            return [
                {**group, "params": [weight for weight in group["params"] if (id(weight) in ids) == of_muon]}
                for group in groups
            ]

        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(part(True), lr=lr, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(part(False), lr=lr, fused=True),
        }
        made = [
            {**group, "by": by} for by, optimizer in self.parts.items() for group in optimizer.param_groups
        ]
        super().__init__(made, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both; mutates the parameters and the state."""
        loss = _evaluated(closure)
        for by, optimizer in self.parts.items():
            optimizer.param_groups = [group for group in self.param_groups if group["by"] == by]
            optimizer.state = self.state
            optimizer.step()
        return loss


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def set_optimizer(trainer: Any, name: Name, learning_rate: float, architecture: Architecture) -> None:
    """Give a trainer, which is mutated, an optimizer that transformers has no name for.

    Muon is for the matrices that read or write the residual stream, where they are parameters of their own:
    not for embeddings, norms, biases, and experts that are stored in stacks.
    """
    if name == "lion":
        trainer.optimizer_cls_and_kwargs = Lion, {"lr": learning_rate}
    elif name == "muon":
        named = dict(trainer.model.named_parameters())
        names = dict.fromkeys(matrix.parameter for matrix in architecture.matrices)
        matrices = [named[name] for name in names if name in named and named[name].ndim == 2]
        trainer.optimizer_cls_and_kwargs = MuonAndAdamW, {"lr": learning_rate, "matrices": matrices}
