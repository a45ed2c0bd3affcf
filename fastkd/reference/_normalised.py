"""Directions of rows, with a derivative at rows that have none."""

from __future__ import annotations

import torch
from torch import Tensor

from .._scale import power_of_two
from .._unit_rows import SHORTEST


def normalised(x: Tensor, dim: int, order: float = 2) -> tuple[Tensor, Tensor]:
    """x at length 1 along ``dim``; and what is short there: it counts as zero, with gradient 0.

    A one in each of its places keeps autograd from 0 / 0.
    """
    scale = power_of_two(x, dim)
    x = x / scale
    short = torch.linalg.vector_norm(x.detach(), order, dim=dim, keepdim=True) * scale <= SHORTEST
    x = torch.where(short, 1, x)
    return torch.where(short, 0, x / torch.linalg.vector_norm(x, order, dim=dim, keepdim=True)), short
