"""Networks that compute in fp64 throughout: transformers takes RMS norms and softmaxes in fp32."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softmax
from torch.overrides import TorchFunctionMode


class Precise(TorchFunctionMode):
    """Within it, what is fp64 stays so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if double and (func is Tensor.float or (func is Tensor.to and args[1:] == (torch.float32,))):
            return args[0]
        if double and func is softmax and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
