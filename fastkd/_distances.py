"""Distances of rows, and sums of their differences, in torch's own operations on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64  # rows
CLOSE = 1e-8  # below, as a share of |x|^2 + |y|^2, a squared distance by products has too few digits left
HIDDEN = 1e-14  # below, so has a difference of two sums of rows, weighted by 1 over the distance
ELEMENTS = 2**22  # that are there at a time, where there are D for each pair
DIRECT = "donot_use_mm_for_euclid_dist"


def squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared distances of the rows of x (N, D) and y (M, D), or of x and itself, in the dtype of x.

    On a CPU by a product of matrices, about a centre, and by differences where that is not precise. Elsewhere all are
    differences: how many are not precise could be known only by waiting for the device.
    """
    if x.device.type != "cpu":
        return torch.cdist(x, x if y is None else y, compute_mode=DIRECT).square()
    x, other = _centred(x, y)
    scale = _scale(x, other)
    result = products(x) if y is None else x @ other.T
    result.mul_(-2).add_(scale)
    for rows, columns in _pairs(result < CLOSE * scale, x.shape[1]):
        result[rows, columns] = (x[rows] - other[columns]).square().sum(-1)
    return result


def pull(weights: Tensor, x: Tensor, y: Tensor | None = None, squares: Tensor | None = None) -> Tensor:
    """sum_j w_ij (x_i - y_j), (N, D). With the squared distances weights may be as large as 1 over a distance is."""
    if squares is not None and x.device.type != "cpu":
        other = x if y is None else y
        count = max(1, ELEMENTS // max(1, other.numel()))
        parts = zip(weights.split(count), x.split(count), strict=True)
        return torch.cat([(w[..., None] * (part[:, None] - other)).sum(1) for w, part in parts])
    x, other = _centred(x, y)
    hidden = None if squares is None else squares < HIDDEN * _scale(x, other)
    seen = weights if hidden is None else weights.masked_fill(hidden, 0)
    result = seen.sum(1, keepdim=True) * x - seen @ other
    if hidden is not None:
        for rows, columns in _pairs(hidden, x.shape[1]):
            result.index_add_(0, rows, weights[rows, columns, None] * (x[rows] - other[columns]))
    return result


def products(x: Tensor) -> Tensor:
    """x x', of which the blocks below the diagonal are copies."""
    n = x.shape[0]
    result = x.new_empty(n, n)
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        torch.mm(x[rows], x[start:].T, out=result[rows, start:])
        result[start + BLOCK :, rows] = result[rows, start + BLOCK :].T
    return result


def _centred(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    centre = x.mean(0) if y is None else (x.mean(0) + y.mean(0)) / 2
    centre = torch.where(centre.isfinite(), centre, 0)  # a row that is not finite says nothing about the others
    x = x - centre
    return x, x if y is None else y - centre


def _scale(x: Tensor, y: Tensor) -> Tensor:
    lengths = x.square().sum(1, keepdim=True)
    return lengths + (lengths if y is x else y.square().sum(1, keepdim=True)).T


def _pairs(mask: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Where it is true: rows and columns, a part at a time."""
    for part in mask.nonzero().split(max(1, ELEMENTS // max(1, width))):
        yield part[:, 0], part[:, 1]
