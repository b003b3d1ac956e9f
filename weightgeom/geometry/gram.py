"""Gram matrices computed by upper-triangle blocks, and the fast CPU matrix product that they use."""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from weightgeom.compat.torch_internals import has_linear_pointwise, linear_pointwise

EXACT = 256  # the width up to which all is computed in fp64, and over all directions


def product(
    a: Float[Tensor, "n k"], b: Float[Tensor, "m k"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "n m"]:
    """The product a bᵀ plus `bias` in each row; `b` or its transpose must be contiguous.

    In fp32 on a CPU this calls oneDNN where torch provides it: oneDNN uses AVX-512 on every processor, while
    MKL (behind `@`) does not on AMD's, where oneDNN is twice as fast. No gradient flows through the product.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _onednn():
        return linear(a, b, bias)
    return linear_pointwise(a.contiguous(), b, bias)


class Products(TorchFunctionMode):
    """Context in which linear layers compute by `product` while gradients are disabled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `linear`; pass every other function through."""
        if func is linear and not kwargs and not torch.is_grad_enabled():
            a, b, *bias = args
            if a.dtype == b.dtype and a.dim() > 1:
                return product(a.flatten(0, -2), b, *bias).unflatten(0, a.shape[:-1])
        return func(*args, **(kwargs or {}))


_onednn = cache(has_linear_pointwise)


def add_gram(total: Float[Tensor, "d d"], x: Float[Tensor, "d n"]) -> None:
    """Add x xᵀ to the upper block triangle of `total`, at 5/8 of the cost of a full product.

    `mirror` fills in the lower triangle.
    """
    d = len(x)
    x = x.contiguous()
    bounds = [d * part // 4 for part in range(5)] if d >= 256 else [0, d]  # smaller blocks cost more
    for start, end in pairwise(bounds):
        total[start:end, start:] += product(x[start:end], x[start:])


def mirror(total: Float[Tensor, "d d"]) -> None:
    """Copy the upper triangle of a symmetric matrix onto the lower one, in slices."""
    for start in range(0, len(total), 512):
        stop = start + 512
        corner = total[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
