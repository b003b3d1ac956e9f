"""The memory of tensors while some code runs, counted by operation, so that it is the same each time."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Within it, the bytes of all tensors that are made and still live, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take note of what an operation makes."""
        given = {one.untyped_storage().data_ptr() for one in tree_iter((args, kwargs)) if _is_real(one)}
        out = func(*args, **(kwargs or {}))
        for one in tree_iter(out):
            if _is_real(one) and (storage := one.untyped_storage()).data_ptr() not in given:
                if self.known.get(storage._cdata) is None:
                    self.known[storage._cdata] = storage
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def _is_real(thing: Any) -> bool:
    return isinstance(thing, Tensor) and thing.device.type != "meta" and thing.layout == torch.strided
