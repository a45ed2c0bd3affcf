r"""Losses that compare the inner products of rows, without N x N matrices where the rows are shorter than N.

For S (N, D) and T (N, D'), with the Frobenius norm::

    |S S' - T T'|^2 = |S' S|^2 - 2 |T' S|^2 + |T' T|^2        d / dS = 4 (S (S' S) - T (T' S))

The right side is a difference of numbers that may be many orders larger: whatever a value depends on is summed in
float64. The gradient's products with the (D, D) matrices are taken in the dtype of the loss, since their rounding is
that of the N x N matrices, if not less.

Of the Gram matrices' rows, g_i = S s_i and h_i = T t_i, the lengths and inner products come from the same matrices::

    |g_i|^2 = s_i' (S' S) s_i        g_i . h_i = t_i' (T' S) s_i

and so does what ``similarity_preserving_loss`` is the sum of, |g_i / |g_i| - h_i / |h_i||^2 = 2 - 2 cos_i::

    d / dS = -2 (a T C - b S M + T (T' (a S)) - S (S' (b S))),    a = 1 / (|g| |h|), b = cos / |g|^2, C = T' S, M = S' S

with a and b one number a row. For S and T centred, h = |T' S|^2, p = |S' S| and q = |T' T|::

    cka = h / (p q)        d cka / dS = 2 / (p q) (T C - h / p^2 S M)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._features import Features, Result, keep, result_dtype
from ._products import Products
from ._scale import power_of_two
from ._unit_rows import SHORTEST, through_unit_rows, unit_rows
from ._widen import chunk_rows, wide_dtype, widen

TILE = 2**22  # pairs that are compared at a time, where the pairs themselves are


def gram_loss(products: Products, student: Features, teacher: Features, gradient: bool, *, reduction: str) -> Result:
    dtype = result_dtype(student, teacher)
    s, t = student.tensor.to(dtype), teacher.tensor.to(dtype)
    return _squares(products, s, t, teacher, "rows", gradient, _scale(s, reduction))


def cosine_relation_loss(
    products: Products, student: Features, teacher: Features, gradient: bool, *, reduction: str
) -> Result:
    dtype = result_dtype(student, teacher)
    (s, lengths), (t, _) = unit_rows(student.tensor.to(dtype)), unit_rows(teacher.tensor.to(dtype))
    loss, slope = _squares(products, s, t, teacher, "directions", gradient, _scale(s, reduction))
    return loss, None if slope is None else through_unit_rows(slope, s, lengths)


def similarity_preserving_loss(
    products: Products, student: Features, teacher: Features, gradient: bool, *, norm: str, reduction: str
) -> Result:
    dtype = result_dtype(student, teacher)
    s, t = student.tensor.to(dtype), teacher.tensor.to(dtype)
    unit, other = power_of_two(s), power_of_two(t)  # products of four features stay within float32
    s, t, shortest = s / unit, t / other, (SHORTEST / widen(unit).square(), SHORTEST / widen(other).square())
    scale = _scale(s, reduction)
    if norm == "l1" or _few(s, t):  # sums of absolute values have no shortcut
        loss, slope = _compared_rows(products, s, t, shortest, gradient, 1 if norm == "l1" else 2, scale)
    else:
        loss, slope = _cosines_of_rows(products, s, t, shortest, teacher, gradient, scale)
    return loss, None if slope is None else slope.div_(unit)


def cka_loss(products: Products, student: Features, teacher: Features, gradient: bool) -> Result:
    dtype = result_dtype(student, teacher)
    s, t = _centred(student.tensor.to(dtype)), _centred(teacher.tensor.to(dtype))
    unit = power_of_two(s)  # the loss does not notice, and products of four features stay within float32
    s, t = s / unit, t / power_of_two(t)
    name = "centred rows"
    if _few(s, t):
        own = widen(products.pairs(s))
        other = widen(keep(teacher, f"{name}: pairs, {dtype}", lambda: products.pairs(t)))
        cross = (own * other).sum()
        own_length, other_length = _length(own), _length(other)
    else:
        own, mixed = products.inner(s, s), products.inner(t, s)
        other = keep(teacher, f"{name}: products, {dtype}", lambda: products.inner(t, t))
        cross, own_length, other_length = mixed.square().sum(), _length(own), _length(other)
    lengths = own_length * other_length
    constant = lengths == 0
    cka = torch.where(constant, 0, cross / lengths)
    loss = (1 - cka).clamp(min=0).to(dtype)
    if not gradient:
        return loss, None
    if _few(s, t):
        own_length, other_length = (torch.where(constant, 1, length) for length in (own_length, other_length))
        difference = cka * (own / own_length) - other / other_length  # 0 where the directions are the same
        return loss, products.times((torch.where(constant, 0, 2 / own_length) * difference).to(dtype), s).div_(unit)
    outer = torch.where(constant, 0, -2 / lengths)
    inner = torch.where(constant, 0, 2 * cka / own_length.square())
    slope = products.times(t, (outer * mixed).to(dtype))
    return loss, products.times(s, (inner * own).to(dtype), slope).div_(unit)


def _few(s: Tensor, t: Tensor) -> bool:
    """Rows: then the N x N matrices are the smaller ones."""
    return s.shape[0] <= max(s.shape[1], t.shape[1])


def _scale(s: Tensor, reduction: str) -> float:
    return 1.0 if reduction == "sum" else 1.0 / max(1, s.shape[0]) ** 2


def _length(matrix: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(matrix, dtype=wide_dtype(matrix))
    return length


def _centred(x: Tensor) -> Tensor:
    x = x - x[:1]  # exact for rows that are close: of equal ones nothing is left
    return x - x.mean(0)


def _squares(
    products: Products, s: Tensor, t: Tensor, teacher: Features, name: str, gradient: bool, scale: float
) -> Result:
    """scale |S S' - T T'|^2; t has what ``name`` says of the teacher."""
    if _few(s, t):
        difference = products.pairs(s).sub_(keep(teacher, f"{name}: pairs, {s.dtype}", lambda: products.pairs(t)))
        loss = scale * difference.square().sum(dtype=wide_dtype(s))
        return loss.to(s.dtype), products.times(difference.mul_(4 * scale), s) if gradient else None
    own, cross = products.inner(s, s), products.inner(t, s)
    other = keep(teacher, f"{name}: products, {s.dtype}", lambda: products.inner(t, t))
    loss = scale * (own.square().sum() - 2 * cross.square().sum() + other.square().sum())
    slope = None
    if gradient:
        slope = products.times(s, (4 * scale * own).to(s.dtype))
        products.times(t, (-4 * scale * cross).to(s.dtype), slope)
    return loss.clamp(min=0).to(s.dtype), slope


def _compared_rows(
    products: Products,
    s: Tensor,
    t: Tensor,
    shortest: tuple[Tensor, Tensor],
    gradient: bool,
    order: int,
    scale: float,
) -> Result:
    """scale sum_i |g_i / |g_i| - h_i / |h_i||_2^2, some rows of both Gram matrices at a time."""
    loss = s.new_zeros((), dtype=wide_dtype(s))
    slope = torch.zeros_like(s) if gradient else None
    tile = max(1, TILE // max(1, s.shape[0]))
    for first in range(0, s.shape[0], tile):
        rows = slice(first, first + tile)
        g, lengths = _normalised(products.pairs(s, rows), order, shortest[0])
        h, _ = _normalised(products.pairs(t, rows), order, shortest[1])
        difference = g - h
        loss += difference.square().sum(dtype=loss.dtype)
        if slope is not None:
            direction = g if order == 2 else g.sign()
            radial = (difference * g).sum(1, keepdim=True)
            towards = torch.where(lengths <= shortest[0], 0, 2 * scale * (difference - direction * radial) / lengths)
            if tile >= s.shape[0]:
                slope = products.times(towards + towards.T, s)
            else:
                products.times(towards, s, slope[rows])
                products.times(towards.T, s[rows], slope)
    return (scale * loss).to(s.dtype), slope


def _normalised(rows: Tensor, order: int, shortest: Tensor) -> tuple[Tensor, Tensor]:
    lengths = torch.linalg.vector_norm(rows, order, dim=1, keepdim=True)
    return torch.where(lengths <= shortest, 0, rows / lengths), lengths


def _cosines_of_rows(
    products: Products,
    s: Tensor,
    t: Tensor,
    shortest: tuple[Tensor, Tensor],
    teacher: Features,
    gradient: bool,
    scale: float,
) -> Result:
    """scale sum_i |g_i / |g_i| - h_i / |h_i||_2^2 by products of features alone."""
    own, cross = products.inner(s, s), products.inner(t, s)
    taught = keep(teacher, "rows: lengths of rows of pairs", lambda: _lengths_of_rows(products, t))
    loss, slope = own.new_zeros(()), torch.empty_like(s) if gradient else None
    outer, inner = s.new_empty(s.shape[0], 1), s.new_empty(s.shape[0], 1)
    step = chunk_rows(s, t)
    for first in range(0, s.shape[0], step):
        rows = slice(first, first + step)
        mine, theirs = widen(s[rows]), widen(t[rows])
        to_own, to_cross = products.times(mine, own), products.times(theirs, cross)
        lengths, other_lengths = _lengths(mine, to_own), taught[rows]
        zero, other_zero = lengths <= shortest[0], other_lengths <= shortest[1]
        a = torch.where(zero | other_zero, 0, 1 / (lengths * other_lengths))
        cosine = (to_cross * mine).sum(1, keepdim=True) * a
        b = torch.where(zero, 0, cosine / lengths.square())
        loss += (2 - zero.to(loss.dtype) - other_zero.to(loss.dtype) - 2 * cosine).sum()
        if slope is not None:
            slope[rows], outer[rows], inner[rows] = b * to_own - a * to_cross, a, b
    loss = (scale * loss).clamp(min=0).to(s.dtype)
    if slope is None:
        return loss, None
    products.times(s, products.times(s.T, inner * s), slope)
    products.times(t, products.times(t.T, -outer * s), slope)
    return loss, slope.mul_(2 * scale)


def _lengths_of_rows(products: Products, x: Tensor) -> Tensor:
    """(N, 1): how long the rows of the Gram matrix are."""
    own = products.inner(x, x)
    return torch.cat([_lengths(rows, products.times(rows, own)) for rows in map(widen, x.split(chunk_rows(x, x)))])


def _lengths(rows: Tensor, to_own: Tensor) -> Tensor:
    """At least the diagonal's entry, which rounding may fall below where the others are nearly orthogonal."""
    least = rows.square().sum(1, keepdim=True).square()
    return torch.maximum((to_own * rows).sum(1, keepdim=True), least).sqrt()
