import pytest
import torch
from torch.testing import assert_close

from weightgeom.geometry import gram
from weightgeom.geometry.gram import Products, add_gram, mirror, product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_the_product_is_that_of_a_naive_loop(dtype, turned, generator):
    a = torch.randn(5, 7, generator=generator).to(dtype)
    b = torch.randn(7, 4, generator=generator).to(dtype).T if turned else torch.randn(4, 7).to(dtype)
    expected = torch.tensor([[float((row.double() * other.double()).sum()) for other in b] for row in a])
    # Seven products of order 1, rounded in the dtype.
    assert_close(product(a, b).float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_without_onednn_the_product_is_the_same_to_rounding(generator, monkeypatch):
    a, b = torch.randn(64, 300, generator=generator), torch.randn(40, 300, generator=generator)
    by_onednn = product(a, b)
    monkeypatch.setattr(gram, "_onednn", lambda: False)
    assert_close(product(a, b), a @ b.T, rtol=0, atol=0)
    assert_close(by_onednn, a @ b.T, rtol=1e-5, atol=1e-4)  # 300 products of order 1, summed in another order


@pytest.mark.parametrize("d", [3, 128, 256, 515])
def test_the_blocks_of_a_gram_matrix_make_up_the_whole(d, generator):
    a = torch.randn(40, d, generator=generator)
    total = torch.zeros(d, d)
    add_gram(total, a.T)
    mirror(total)
    assert_close(total, total.T, rtol=0, atol=0)
    assert_close(total, a.T @ a, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_network_gives_the_same_output_within_products(bias, generator):
    layer = torch.nn.Linear(300, 40, bias=bias)
    a = torch.randn(2, 3, 300, generator=generator)
    with torch.no_grad(), Products():
        output = layer(a)
    assert_close(output, layer(a).detach(), rtol=1e-5, atol=1e-5)  # the sum of 300 products in another order


def test_with_gradients_enabled_products_change_nothing():
    layer = torch.nn.Linear(3, 2)
    with Products():
        layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_a_gram_matrix_is_added_to_the_total(generator):
    a, b = torch.randn(7, 300, generator=generator), torch.randn(9, 300, generator=generator)
    total = torch.zeros(300, 300)
    add_gram(total, a.T)
    add_gram(total, b.T)
    mirror(total)
    assert_close(total, a.T @ a + b.T @ b, rtol=1e-5, atol=1e-4)


def test_mirroring_takes_the_upper_triangle(generator):
    total = torch.randn(1100, 1100, generator=generator)
    upper = total.triu()
    mirror(total)
    assert_close(total, upper + upper.triu(1).T, rtol=0, atol=0)
