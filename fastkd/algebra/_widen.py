"""What is summed in float64. The shortcuts take differences of large sums, whose digits float32 would lose."""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import kept

NARROW = ("mps",)  # devices that have no float64
CHUNK = 2**16  # numbers that are widened at a time: they stay in a processor's second-level cache
CHUNK_GPU = 2**24


def widen(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type in NARROW else torch.float64


@kept
def wide(features: Tensor) -> Tensor:
    return widen(features)


def products(x: Tensor, y: Tensor) -> Tensor:
    """x' y, (D, D'), in float64. A few rows are widened at a time: whole copies cost as much as half the products."""
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=wide_dtype(x))
    for a, b in zip(x.split(chunk_rows(x, y)), y.split(chunk_rows(x, y)), strict=True):
        left = widen(a)
        total.addmm_(left.T, left if y is x else widen(b))
    return total


def chunk_rows(x: Tensor, y: Tensor) -> int:
    chunk = CHUNK if x.device.type == "cpu" else CHUNK_GPU
    return max(1, chunk // max(1, x.shape[1], y.shape[1]))
