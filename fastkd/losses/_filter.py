"""Which parts of a vocabulary the two backward matmuls may leave out: where no row's gradient is worth anything.

Source: Wijmans et al. 2025, arXiv 2411.09009 (gradient filtering in cut cross-entropy), here for any gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 512  # ids that are kept or left out together, for
ROWS = 64  # so many rows: with more, every tile holds somebody's label


def kept(gradient: Tensor, unit: Tensor, eps: float) -> list[slice]:
    """The ranges of ids outside of which every |gradient| is at most ``eps * unit`` in its row; NaN is kept.

    Args:
        gradient: ``(rows, V)``.
        unit: ``(rows,)``, what a row's gradient was multiplied with, not negative.
    """
    vocabulary = gradient.shape[1]
    whole = vocabulary // TILE * TILE
    tiles = gradient[:, :whole].unflatten(1, (-1, TILE))
    largest = _largest(tiles)
    if whole < vocabulary:
        largest = torch.cat([largest, _largest(gradient[:, None, whole:])], 1)
    matters = (~(largest <= eps * unit.unsqueeze(1))).any(0).tolist()
    ranges: list[slice] = []
    for tile, keep in enumerate(matters):
        begin, end = tile * TILE, min((tile + 1) * TILE, vocabulary)
        if keep and ranges and ranges[-1].stop == begin:
            ranges[-1] = slice(ranges[-1].start, end)
        elif keep:
            ranges.append(slice(begin, end))
    return ranges


def _largest(tiles: Tensor) -> Tensor:
    """(rows, tiles): the largest magnitude, or NaN."""
    return torch.maximum(tiles.amax(2), -tiles.amin(2))
