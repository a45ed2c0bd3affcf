"""The products of ``fastkd/_products.py`` by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _distances
from .._products import ALL
from .._widen import chunk_rows, wide_dtype, widen


def inner(x: Tensor, y: Tensor) -> Tensor:
    """A few rows are widened at a time: whole copies cost as much as half the products."""
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=wide_dtype(x))
    for a, b in zip(x.split(chunk_rows(x, y)), y.split(chunk_rows(x, y)), strict=True):
        left = widen(a)
        total.addmm_(left.T, left if y is x else widen(b))
    return total


def pairs(x: Tensor, rows: slice = ALL, wide: bool = False) -> Tensor:
    x = widen(x) if wide else x
    some = x[rows]
    return _distances.products(x) if len(some) == len(x) and x.device.type == "cpu" else some @ x.T


def times(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    y = y.to(x.dtype)
    return torch.mm(x, y) if out is None else out.addmm_(x, y)
