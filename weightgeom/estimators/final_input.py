"""The inputs of the unembedding: the residual stream behind the last layer and the final norm."""

from contextlib import suppress

import torch
from torch import Tensor, nn

from weightgeom.estimators.moments import GIB, Accumulator, Enough, check_finite
from weightgeom.estimators.reference_subspaces import Frame, Inputs, text_batches
from weightgeom.geometry.bootstrap import FEW_TOKENS
from weightgeom.geometry.gram import Products
from weightgeom.interfaces import Setting
from weightgeom.params import Params

PLACE = ("final_input", None)


def final_frame(setting: Setting, params: Params, k: int, inputs: Inputs) -> Frame:
    """The top-k eigenvectors of E[a aᵀ] of what the unembedding reads, over held-out text.

    a is the output of the final norm, its gain and bias included: logits = W_U a. At most 16 tokens a
    dimension are taken, and at least 8192, since this is a pass of its own through the whole network.

    Raises:
        ValueError: if an activation is not finite.
    """
    model = setting.model
    budget = float("inf") if inputs.budget_gb is None else inputs.budget_gb * GIB
    limit = min(inputs.tokens, max(8192, FEW_TOKENS * model.architecture.d_model))
    batches = text_batches(setting, inputs, limit)
    streams = model.size > budget / 2
    weights: Params = {} if streams else model.hold(params)
    model = model.streaming(params) if streams else model
    accumulator, mask, tokens = Accumulator(1, inputs.dtype), torch.zeros(0, 0, dtype=torch.bool), 0

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        accumulator.add(output.reshape(*mask.shape, -1)[mask], 0)
        raise Enough

    norm = model.architecture.final_norm.parameter.rpartition(".")[0]
    handle = model.network.get_submodule(norm).register_forward_hook(hook)
    try:
        for batch in (batch.to(model.device) for batch in batches):
            mask = batch.attention_mask.bool()
            tokens += int(mask.sum())
            with suppress(Enough), Products():
                model.logits(weights, batch, keep=1)
    finally:
        handle.remove()
    moment = accumulator.moment(torch.tensor([float(tokens)], dtype=torch.float64), inputs.centre)
    check_finite(moment.sums, "the input of the unembedding")
    space = moment.top(k)
    shares = space.shares(moment.value.cpu().double())
    return Frame(PLACE, space, rank=int((shares > 1e-6 * shares.max()).sum()))
