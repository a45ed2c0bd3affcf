r"""Losses of similarities between all pairs of rows, some rows of both N x N matrices at a time.

Of a loss that is a function of the products c_ij = x_i . x_j, with M_ij = d loss / d c_ij, the gradient is (M + M') X.
For ``pkt_loss``, with x the unit rows, r_ij = q_ij / (p_ij + eps) and z_i the sum of a row of 1 + c::

    M_ij = (sum_k r_ik p_ik - r_ij) / z_i

The rows x_i = v_i / l_i are not built: c_ij is a product of the v over their lengths, and with W = M + M' the gradient
of v_i, which is across v_i, is::

    (sum_j W_ij v_j / l_j - (sum_j W_ij c_ij) v_i / l_i) / l_i
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._distances import ELEMENTS
from ._features import Features, Result, kept, result_dtype
from ._products import Products
from ._unit_rows import SHORTEST, through_unit_rows, unit_rows
from ._widen import wide_dtype, widen

Compare = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]


def pkt_loss(
    products: Products,
    compare: Compare,
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    eps: float,
    reduction: str,
) -> Result:
    """``compare``: cosines of some rows of both sides, eps, gradient -> the sum of the terms, and their M if wanted."""
    dtype = result_dtype(student, teacher)
    s, t = student.tensor.to(dtype), teacher.tensor.to(dtype)
    mine, theirs = inverse_lengths(student), inverse_lengths(teacher)
    total = mine.new_zeros(())
    slope = None
    for rows in _strips(s):
        cosines = _cosines(products, s, mine, rows)
        some, slopes = compare(cosines, _cosines(products, t, theirs, rows), eps, gradient)
        total += some
        if slopes is not None:
            slope = _pull(products, s, mine, rows, cosines, slopes, slope)
    scale = 1.0 if reduction == "sum" else 1.0 / max(1, len(s)) ** 2
    if gradient:
        slope = torch.zeros_like(s) if slope is None else slope.mul_(scale).to(dtype)
    return (total * scale).to(dtype), slope


def _pull(
    products: Products, x: Tensor, inverse: Tensor, rows: slice, cosines: Tensor, slopes: Tensor, before: Tensor | None
) -> Tensor:
    """The gradient that some rows of M give, in float64: of what is along a row, nothing may be left by rounding."""
    square = inverse.square()
    if len(slopes) == len(x):
        weights = slopes + slopes.T
        along = cosines.mul_(weights).sum(1, keepdim=True)
        weights.mul_(inverse).mul_(inverse.T).diagonal().sub_((along * square)[:, 0])
        return products.times(weights, x)
    result = torch.zeros_like(x, dtype=slopes.dtype) if before is None else before
    towards = cosines.mul_(slopes)
    weights = slopes.mul_(inverse[rows]).mul_(inverse.T)
    products.times(weights, x, result[rows]).addcmul_(x[rows], towards.sum(1, keepdim=True) * square[rows], value=-1)
    return products.times(weights.T, x[rows], result).addcmul_(x, towards.sum(0).unsqueeze(1) * square, value=-1)


@kept
def inverse_lengths(features: Tensor) -> Tensor:
    """(N, 1), 0 for short rows."""
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=wide_dtype(features))
    return torch.where(lengths <= SHORTEST, 0, 1 / lengths)


def _cosines(products: Products, x: Tensor, inverse: Tensor, rows: slice) -> Tensor:
    return products.pairs(x, rows, wide=True).mul_(inverse[rows]).mul_(inverse.T)


@kept
def wide_unit_rows(features: Tensor) -> Tensor:
    return unit_rows(widen(features))[0]


def _strips(rows: Tensor) -> Iterator[slice]:
    count = max(1, ELEMENTS // max(1, len(rows)))
    return (slice(start, min(start + count, len(rows))) for start in range(0, len(rows), count))


def correlation_congruence_loss(
    products: Products,
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    form: str,
    gamma: float,
    order: float,
    normalize_rows: float,
    reduction: str,
) -> Result:
    s, t = widen(student.tensor), widen(teacher.tensor)
    lengths = None
    if normalize_rows:
        (s, lengths), t = unit_rows(s), wide_unit_rows(teacher)
    if form == "taylor":
        total, slope = _taylor(products, s, t, gradient, gamma, int(order))
        terms = len(s) ** 2
    else:
        total, slope = _neighbours(s, t, gradient)
        terms = len(s) - 1
    scale = 1.0 if reduction == "sum" else 1.0 / max(1, terms)
    dtype = result_dtype(student, teacher)
    if slope is None:
        return (total * scale).to(dtype), None
    slope = slope if lengths is None else through_unit_rows(slope, s, lengths)
    return (total * scale).to(dtype), (slope * scale).to(dtype)


def _taylor(products: Products, s: Tensor, t: Tensor, gradient: bool, gamma: float, order: int) -> Result:
    total, slope = s.new_zeros(()), torch.empty_like(s)
    for rows in _strips(s):
        kernel, derivative = _kernel(products.pairs(s, rows), gamma, order)
        difference = kernel.sub_(_kernel(products.pairs(t, rows), gamma, order)[0])
        total += difference.square().sum()
        if gradient:
            slope[rows] = products.times(derivative.mul_(difference), s)
    return total, slope.mul_(4) if gradient else None


def _kernel(pairs: Tensor, gamma: float, order: int) -> tuple[Tensor, Tensor]:
    """k and its derivative, by Horner's rule."""
    value, derivative = torch.zeros_like(pairs), torch.zeros_like(pairs)
    for p in range(order, -1, -1):
        derivative = derivative.mul_(pairs).add_(value)
        # The logarithm, because (2 gamma)^p and p! may be larger than any float.
        value = value.mul_(pairs).add_(math.exp(p * math.log(2 * gamma) - 2 * gamma - math.lgamma(p + 1)))
    return value, derivative


def _neighbours(s: Tensor, t: Tensor, gradient: bool) -> Result:
    gaps = s - t
    sizes = gaps.abs()
    total = (sizes[:-1] * sizes[1:]).sum()
    if not gradient:
        return total, None
    weights = torch.zeros_like(sizes)
    weights[:-1] += sizes[1:]
    weights[1:] += sizes[:-1]
    return total, weights * gaps.sign()
