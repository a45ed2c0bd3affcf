"""The products that losses on relations are made of, by every implementation, against torch in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from feature_problems import flat
from torch import Tensor

from fastkd._products import Products

IMPLEMENTATIONS = ("algebra", "native")
# N, D, D': one, none, whole panels of any instruction set, one more and one less, and sums longer than what is packed
SHAPES = [(1, 1, 1), (3, 5, 2), (0, 4, 3), (5, 0, 3), (33, 31, 65), (64, 32, 32), (130, 47, 9), (300, 17, 40)]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def products(impl: str) -> Products:
    module: Products = importlib.import_module(f"fastkd.{impl}._products")  # type: ignore[assignment]
    return module


def assert_product(got: Tensor, left: Tensor, right: Tensor, plus: Tensor | None = None) -> None:
    """Each number is off by no more than a sum of as many products in its dtype."""
    exact = left.double() @ right.double()
    size = left.double().abs() @ right.double().abs()
    if plus is not None:
        exact, size = exact + plus.double(), size + plus.double().abs()
    assert got.shape == exact.shape
    assert got.is_contiguous()
    bound = (8 + left.shape[1]) * torch.finfo(got.dtype).eps * size
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inner(products: Products, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, d, other = shape
    x, y = flat(n, d).to(dtype), flat(n, other, 1).to(dtype)
    for left, right in ((x, y), (x, x)):
        got = products.inner(left, right)
        assert got.dtype is torch.float64
        assert_product(got, left.T, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs(products: Products, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = flat(*shape[:2]).to(dtype)
    for wide in (False, True):
        got = products.pairs(x, wide=wide)
        assert got.dtype is (torch.float64 if wide else dtype)
        assert_product(got, x, x.T)
        some = slice(len(x) // 3, len(x) // 2)
        assert_product(products.pairs(x, some, wide=wide), x[some], x.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_times(products: Products, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, d, other = shape
    for y in (flat(d, other, 1), flat(other, d, 1).T, flat(2 * d, other, 1)[::2]):
        x, out = flat(n, d).to(dtype), flat(n, other, 2).to(dtype)
        assert_product(products.times(x, y.to(dtype)), x, y)
        assert_product(products.times(x.T.contiguous().T, y), x, y)  # y may be the narrower one
        got = products.times(x, y.to(dtype), out.clone())
        assert_product(got, x, y, out)
        got = out.clone()
        assert products.times(x, y.to(dtype), got).data_ptr() == got.data_ptr()
        assert_product(got, x, y, out)


def test_an_outer_product_is_added_to_what_is_not_symmetric(products: Products) -> None:
    x, out = flat(40, 7), flat(40, 40, 1)
    assert_product(products.times(x, x.T, out.clone()), x, x.T, out)


def test_not_a_number_stays_in_its_row(products: Products) -> None:
    x, y = flat(37, 20), flat(20, 35, 1)
    x[5, 3] = float("nan")
    bad = products.times(x, y).isnan()
    assert bad[5].all()
    assert bad.sum() == 35
    bad = products.pairs(x).isnan()
    assert bad.sum() == 2 * 37 - 1


@pytest.mark.native
def test_the_same_bits_with_more_threads_and_on_both_sides_of_the_diagonal() -> None:
    products: Products = importlib.import_module("fastkd.native._products")  # type: ignore[assignment]
    x, y = flat(300, 150), flat(300, 90, 1)

    def all_kinds() -> tuple[Tensor, ...]:
        return products.inner(x, y), products.inner(x, x), products.pairs(x), products.times(x.T, y)

    one = all_kinds()
    torch.set_num_threads(2)
    assert all(torch.equal(got, want) for got, want in zip(all_kinds(), one, strict=True))
    assert all(torch.equal(got, got.T) for got in one[1:3])
