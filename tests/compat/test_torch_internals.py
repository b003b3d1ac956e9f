"""Each door fails with the name that a new version of torch has moved."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from weightgeom.compat.torch_internals import (
    exchange_parameter,
    has_linear_pointwise,
    linear_pointwise,
    storage_key,
    tensors_in,
    trim_memory,
)

MOVED = "torch moved {}: change weightgeom/compat/torch_internals.py"


def test_onednns_product_is_there_and_right_or_not_used():
    if not torch.backends.mkldnn.is_available():
        assert not has_linear_pointwise()
        return
    assert has_linear_pointwise(), MOVED.format("torch.ops.mkldnn._linear_pointwise")
    # Row (1, 2) times rows (3, 4) and (5, 6): 3 + 8, 5 + 12.
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    assert linear_pointwise(a, b, None).tolist() == [[11.0, 17.0]]
    assert linear_pointwise(a, b, torch.tensor([1.0, 2.0])).tolist() == [[12.0, 19.0]]


def test_a_parameter_is_exchanged_in_its_place():
    layer, weight = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
    own = layer.weight
    assert exchange_parameter(layer, "weight", weight) is own
    moved = MOVED.format("Module._parameters")
    assert layer.weight is weight and layer(torch.ones(1, 2)).item() == 7, moved
    exchange_parameter(layer, "weight", own)
    assert layer.weight is own


def test_two_views_have_one_storage_and_two_tensors_have_two():
    tensor_a, tensor_b = torch.zeros(4), torch.zeros(4)
    keys = [storage_key(tensor.untyped_storage()) for tensor in (tensor_a, tensor_a[:2], tensor_b)]
    assert keys[0] == keys[1] != keys[2], MOVED.format("UntypedStorage._cdata")


def test_tensors_are_found_in_containers_unless_they_have_no_memory():
    tensor_a, tensor_b = torch.zeros(1), torch.zeros(2)
    nested = {
        "a": [tensor_a, 3, (tensor_b, None)],
        "b": torch.zeros(1, device="meta"),
        "c": tensor_a.to_sparse(),
    }
    assert [id(tensor) for tensor in tensors_in(nested)] == [id(tensor_a), id(tensor_b)], MOVED.format(
        "_pytree"
    )


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
def test_freed_memory_below_memory_in_use_is_given_back():
    def anonymous() -> int:  # KiB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    tensors = [torch.ones(2**14) for _ in range(1024)]  # of 64 KiB: too small for mappings of their own
    before = anonymous()
    del tensors[:-1]
    trim_memory()
    assert anonymous() < before - 2**15  # half of what is free, at least: the rest may have been reused
