"""Private names of torch 2: oneDNN's product, parameters of a module, storages and operations."""

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

M_MMAP_THRESHOLD = -3  # of malloc.h


def linear_pointwise(
    a: Float[Tensor, "n k"], b: Float[Tensor, "m k"], bias: Float[Tensor, " m"] | None
) -> Float[Tensor, "n m"]:
    """The product a bᵀ plus `bias` by oneDNN: `torch.ops.mkldnn._linear_pointwise`.

    It uses AVX-512 on every processor; MKL, behind `@`, does not on AMD's, where this is twice as fast.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def has_linear_pointwise() -> bool:
    """Whether this build of torch has `linear_pointwise`, and computes it rightly."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(linear_pointwise(a, b, None), a @ b.T)
    except (RuntimeError, TypeError):
        return False


def release_memory() -> None:
    """Give freed memory back to the system, now and from now on: `mallopt` and `malloc_trim` of glibc.

    By default tensors of up to 32 MiB are allocated on its heap, which it keeps for later ones; from the
    first call on, up to 2 MiB. Nothing where there is another C library.
    """
    library = _c_library()
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 2**21)
    trim_memory()


def trim_memory() -> None:
    """Give freed memory back to the system, now alone: pages of glibc's heap on which nothing is left."""
    library = _c_library()
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _c_library() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def exchange_parameter(module: nn.Module, key: str, weight: Tensor) -> Tensor:
    """Put `weight` in the place of a parameter, which is returned; mutates `module._parameters`.

    The public setters make a new `nn.Parameter`, or copy into the old one, which costs a pass over it.
    """
    before = module._parameters[key]
    module._parameters[key] = weight  # pyright: ignore[reportArgumentType]
    assert before is not None
    return before


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors with memory in nested containers, as `torch.utils._pytree` goes through them."""
    from torch.utils._pytree import tree_iter

    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta" and leaf.layout == torch.strided:
            yield leaf


def storage_key(storage: torch.UntypedStorage) -> int:
    """The identity of a storage while it lives: `_cdata`; its Python object is made anew by each tensor."""
    return storage._cdata
