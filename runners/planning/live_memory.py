"""Memory of live tensors within a block of code, counted by operation and therefore reproducible."""

import weakref
from typing import Any

from weightgeom.compat.torch_internals import TorchDispatchMode, storage_key, tensors_in


class LiveMemory(TorchDispatchMode):
    """Within it, `now` is the bytes of the live tensors made in it, and `peak` the maximum of `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storage of its new tensors."""
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tensors_in(out)):
            key = storage_key(storage)
            if storage.data_ptr() not in given and self.known.get(key) is None:
                self.known[key] = storage
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size
