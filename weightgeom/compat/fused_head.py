"""The fused head that TRL asks of a network: log-probabilities of the labels instead of logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FusedOutputs:
    """The outputs of the head by row and predicted token, 0 where `label_mask` is off; TRL's names."""

    log_probs: Tensor
    label_mask: Tensor
    entropy: Tensor
    is_top1: Tensor
    mean_logits: Tensor | None = None
    aux_loss: Tensor | None = None


def with_fused_head(forward: Callable[..., Any], head: Callable[..., FusedOutputs]) -> Callable[..., Any]:
    """`forward`, except that `head(labels, **inputs)` answers where a trainer asks for the fused head.

    Trainers of TRL 1 call `network(..., labels=labels, fused_lm_head=True)`, which a patch of theirs
    (`trl.trainer.utils.add_fused_lm_head`) computes by tiles of a fixed size, and read `FusedOutputs`. They
    have no argument for another loss by token, or for another size.
    """

    def answer(*given: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **inputs: Any) -> Any:
        if fused_lm_head and labels is not None:
            return head(labels, *given, **inputs)
        return forward(*given, **({} if labels is None else {"labels": labels}), **inputs)

    return answer


def first_rows(outputs: Any, rows: int) -> FusedOutputs:
    """The first rows of the outputs of TRL's own head, `FusedCausalLMOutput`, without a router's loss."""
    names = ("log_probs", "label_mask", "entropy", "is_top1", "mean_logits")
    return FusedOutputs(**{name: getattr(outputs, name)[:rows] for name in names})


def has_further_terms(trainer: Any) -> bool:
    """Whether more than log-probabilities enters the loss of a trainer: weights of pairs, a router's loss.

    `use_weighting` and `aux_loss_enabled` of TRL 1 are attributes of some of its trainers, in no document.
    """
    return bool(getattr(trainer, "use_weighting", False) or getattr(trainer, "aux_loss_enabled", False))


def router_weight(trainer: Any) -> float:
    """The weight of the logged `aux_loss` of a mixture's routers in a trainer's loss, 0 where it has none.

    `router_aux_loss_coef` of TRL 1 is an attribute of its trainers, in no document.
    """
    return trainer.router_aux_loss_coef if getattr(trainer, "aux_loss_enabled", False) else 0.0
