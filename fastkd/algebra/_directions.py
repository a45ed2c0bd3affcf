"""Rows divided by their length, and what that makes of a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import SHORTEST
from ._widen import wide_dtype


def directions(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x at length 1 along ``dim``, or 0 where it is short; and how long it was."""
    lengths = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide_dtype(x)).to(x.dtype)
    return torch.where(lengths <= SHORTEST, 0, x / lengths), lengths


def undirected(slope: Tensor, direction: Tensor, lengths: Tensor, dim: int) -> Tensor:
    """The gradient of x, from that of its direction: the part across x, over the length. 0 where x is short."""
    across = slope - direction * (slope * direction).sum(dim, keepdim=True)
    return torch.where(lengths <= SHORTEST, 0, across / lengths)
