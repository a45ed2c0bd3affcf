"""Rows divided by their length, and what that makes of a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._widen import wide_dtype

SHORTEST = 1e-12  # a row that is no longer counts as zero, with gradient 0


def unit_rows(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """x at length 1 along ``dim``, or 0 where it is short; and how long it was (inf there)."""
    lengths = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide_dtype(x)).to(x.dtype)
    short = lengths <= SHORTEST
    return torch.where(short, 0.0, x / lengths), torch.where(short, torch.inf, lengths)


def through_unit_rows(slope: Tensor, units: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """From the gradient of the unit rows to that of the rows: the part across them, over the length."""
    along = torch.linalg.vecdot(units, slope, dim=dim).unsqueeze(dim)
    return torch.addcmul(slope, units, along, value=-1).div_(lengths)
