"""Numbers in float64. Shortcuts take differences of large sums, whose digits float32 would lose."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = ("mps",)  # devices that have no float64
CHUNK = 2**16  # numbers that are widened at a time: they stay in a processor's second-level cache
CHUNK_GPU = 2**24


def widen(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor)).contiguous()


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type in NARROW else torch.float64


def chunk_rows(x: Tensor, y: Tensor) -> int:
    """Rows that are widened at a time, where whole copies would cost as much as what is done with them."""
    chunk = CHUNK if x.device.type == "cpu" else CHUNK_GPU
    return max(1, chunk // max(1, x.shape[1], y.shape[1]))
