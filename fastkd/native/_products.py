"""Addresses of matrices, for the products of ``fastkd/_products.py`` in C++ (csrc/cpu/matmul_panels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._products import ALL
from . import extension
from .logit import CPU

_C = extension()


def inner(x: Tensor, y: Tensor) -> Tensor:
    return _matmul(x.T, y, torch.empty(x.shape[1], y.shape[1], dtype=torch.float64, device=CPU))


def pairs(x: Tensor, rows: slice = ALL, wide: bool = False) -> Tensor:
    some = x[rows]
    dtype = torch.float64 if wide else x.dtype
    return _matmul(some, x.T, torch.empty(len(some), len(x), dtype=dtype, device=CPU))


def times(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return _matmul(x, y, out, adds=True)
    return _matmul(x, y, torch.empty(x.shape[0], y.shape[1], dtype=x.dtype, device=CPU))


def _matmul(x: Tensor, y: Tensor, out: Tensor, adds: bool = False) -> Tensor:
    """``out`` is contiguous."""
    x, y = x.resolve_neg(), y.resolve_neg()  # signs that torch has not changed yet
    compute = _C.matmul_wide if out.dtype is torch.float64 else _C.matmul
    left = x.data_ptr(), x.dtype is torch.float64, x.stride(0), x.stride(1)
    right = y.data_ptr(), y.dtype is torch.float64, y.stride(1), y.stride(0)
    compute(*left, *right, *x.shape, y.shape[1], adds, torch.get_num_threads(), out.data_ptr())
    return out
