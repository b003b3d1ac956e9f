"""Streaming second moments of the activations that the residual-stream matrices read."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightgeom.interfaces import Params
from weightgeom.model import LanguageModel
from weightgeom.residual import Site
from weightgeom.tokens import Batch


def activation_moments(
    model: LanguageModel,
    params: Params,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    *,
    centre: bool = False,
) -> tuple[dict[Site, Float[Tensor, "d d"]], int]:
    """Second moments E[a aᵀ] over unpadded tokens at every site, in fp32 sums, and the number of tokens.

    Nothing is cached but the d x d sums. `centre` subtracts the mean: the covariance. Source: the
    attention-input subspace of arXiv:2605.16600; uncentred by default, which is ours.

    Raises:
        ValueError: if an activation is not finite.
    """
    sums: dict[Site, Tensor] = {}
    means: dict[Site, Tensor] = {}
    mask = torch.zeros(0, dtype=torch.bool)

    def accumulate(site: Site):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            a = inputs[0][mask].float()
            sums[site] = sums[site] + a.T @ a if site in sums else a.T @ a
            means[site] = means[site] + a.sum(0) if site in means else a.sum(0)

        return model.network.get_submodule(site.module).register_forward_pre_hook(hook)

    tokens = 0
    hooks = [accumulate(site) for site in sites]
    try:
        for batch in (batch.to(model.device) for batch in batches):
            mask = batch.attention_mask.bool()
            tokens += int(mask.sum())
            model.logits(params, batch, keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    for site, total in sums.items():
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"the {site.name} of layer {site.layer} is not finite: the weights have diverged"
            )
    moments = {site: total / tokens for site, total in sums.items()}
    if centre:
        moments = {site: moments[site] - torch.outer(m, m) / tokens**2 for site, m in means.items()}
    return moments, tokens
