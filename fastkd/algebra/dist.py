r"""Correlations of rows and of columns, and their gradient, in sweeps over blocks of rows.

With x = q - 1/C and y = p - 1/C, whose rows are centred since softmaxes sum to 1, x' and y' the same less the means of
their columns, and dot a correlation's x.y, n and m its lengths::

    dr/dx = a y - b x        a = 1 / (n m + eps)        b = a**2 dot m / n

The slopes in a row are those of its own correlation and, with x', y' and other a, b, those of the columns'. Beside p, q
and the gradient, blocks are all that is allocated; sums over a column are added up in float64, about its mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._features import Features, Result, result_dtype
from .._widen import widen

EPS = 1e-8
BLOCK = 2**18  # elements

Sums = tuple[Tensor, Tensor, Tensor]  # x.y, x.x and y.y


def dist_loss(
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    factor: float,
) -> Result:
    dtype = result_dtype(student, teacher)
    q, p = ((side.tensor.to(dtype) / temperature).softmax(-1) for side in (student, teacher))
    rows, classes = q.shape
    if rows == 0:
        return q.sum(), q if gradient else None
    even = 1 / classes
    of_rows, row_slopes = _correlations(_row_sums(q, p, even))
    centres = Centre(q), Centre(p)
    of_columns, column_slopes = _correlations(_column_sums(q, p, centres))
    loss = beta * (1 - of_rows.mean()) if beta else of_rows.new_zeros(())
    if gamma:
        loss = loss + gamma * (1 - of_columns.mean())
    if gradient:
        scale = -factor / temperature
        by_row = [(slope * (scale * beta / rows)).to(dtype).unsqueeze(1) for slope in row_slopes]
        by_column = [(slope * (scale * gamma / classes)).to(dtype) for slope in column_slopes]
        for block in _blocks(q):
            own, taught = q[block], p[block]
            slope = (taught - even) * by_row[0][block] - (own - even) * by_row[1][block]
            slope += centres[1].deviations(taught) * by_column[0] - centres[0].deviations(own) * by_column[1]
            # Less that of the largest q, which has to vanish where it is all: a small mean, and no difference of two.
            slope -= slope.gather(1, own.argmax(1, keepdim=True))
            slope -= torch.linalg.vecdot(own, slope).unsqueeze(1)
            own.mul_(slope)
    return (factor * loss).to(dtype), q if gradient else None


def _row_sums(q: Tensor, p: Tensor, even: float) -> Sums:
    sums = [widen(q.new_empty(len(q))) for _ in range(3)]
    for block in _blocks(q):
        for total, part in zip(sums, _products(q[block] - even, p[block] - even, 1), strict=True):
            total[block] = part
    return sums[0], sums[1], sums[2]


class Centre:
    """The means of columns as the first row and what lies beyond: where a column is nearly constant, deviations from
    it keep their digits, and a constant one has none."""

    def __init__(self, x: Tensor) -> None:
        self.first = x[0].clone()
        total = widen(torch.zeros_like(self.first))
        for block in _blocks(x):
            total += (x[block] - self.first).sum(0)
        self.beyond = (total / len(x)).to(x.dtype)

    def deviations(self, block: Tensor) -> Tensor:
        return (block - self.first).sub_(self.beyond)


def _column_sums(q: Tensor, p: Tensor, centres: tuple[Centre, Centre]) -> Sums:
    sums = [widen(torch.zeros_like(q[0])) for _ in range(3)]
    for block in _blocks(q):
        deviations = centres[0].deviations(q[block]), centres[1].deviations(p[block])
        for total, part in zip(sums, _products(*deviations, 0), strict=True):
            total += part
    return sums[0], sums[1], sums[2]


def _products(x: Tensor, y: Tensor, dim: int) -> Iterator[Tensor]:
    for left, right in ((x, y), (x, x), (y, y)):
        yield torch.linalg.vecdot(left, right, dim=dim)


def _correlations(sums: Sums) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """r, and a and b of its slopes; 0 where a side is constant."""
    dot, squares, others = sums
    known = (squares != 0) & (others != 0)
    n, m = (torch.where(known, x, 1.0).sqrt() for x in (squares, others))
    a = torch.where(known, 1 / (n * m + EPS), 0.0)
    return dot * a, (a, a * a * dot * (m / n))


def _blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // x.shape[1])
    for begin in range(0, len(x), step):
        yield slice(begin, begin + step)
