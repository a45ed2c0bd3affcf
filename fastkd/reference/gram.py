r"""Losses that compare the inner products of rows, by building both N x N matrices.

With s_i, t_i the rows of student and teacher, whose lengths may differ, and g_ij = s_i . s_j, h_ij = t_i . t_j::

    gram_loss                   sum_ij (g_ij - h_ij)^2 / N^2
    cosine_relation_loss        the same of rows of length 1, s_i / |s_i|
    similarity_preserving_loss  sum_i |g_i / |g_i| - h_i / |h_i||_2^2 / N^2, with g_i, h_i the rows of g and h
    cka_loss                    1 - sum_ij g_ij h_ij / (|g| |h|) of centred s and t
                                = |g / |g| - h / |h||^2 / 2, which subtracts no two numbers near 1

"sum" does not divide by N^2. A row is divided by its Euclidean length (for ``norm="l1"``, g_i and h_i by the sum of
their absolute values); one no longer than 1e-12 counts as zero, and what was divided has gradient 0. Where g or h of
``cka_loss`` is all 0, the loss is 1 and the gradient 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import Features, Result, result_dtype
from .._scale import power_of_two
from ._gradient import value_and_gradient
from ._normalised import normalised


def gram_loss(student: Features, teacher: Features, gradient: bool, *, reduction: str) -> Result:
    dtype = result_dtype(student, teacher)
    taught = teacher.tensor.to(dtype)

    def formula(s: Tensor) -> Tensor:
        return _reduce((s @ s.T - taught @ taught.T).square(), reduction)

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def cosine_relation_loss(student: Features, teacher: Features, gradient: bool, *, reduction: str) -> Result:
    dtype = result_dtype(student, teacher)
    taught, _ = normalised(teacher.tensor.to(dtype), 1)

    def formula(s: Tensor) -> Tensor:
        s, _ = normalised(s, 1)
        return _reduce((s @ s.T - taught @ taught.T).square(), reduction)

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def similarity_preserving_loss(
    student: Features, teacher: Features, gradient: bool, *, norm: str, reduction: str
) -> Result:
    dtype = result_dtype(student, teacher)
    order = 1 if norm == "l1" else 2
    taught = teacher.tensor.to(dtype)
    taught, _ = normalised(taught @ taught.T, 1, order)

    def formula(s: Tensor) -> Tensor:
        return _reduce((normalised(s @ s.T, 1, order)[0] - taught).square(), reduction)

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def cka_loss(student: Features, teacher: Features, gradient: bool) -> Result:
    dtype = result_dtype(student, teacher)
    taught = _centred(teacher.tensor.to(dtype))
    h, no_teacher = _direction(taught @ taught.T)

    def formula(s: Tensor) -> Tensor:
        s = _centred(s)
        g, no_student = _direction(s @ s.T)
        return torch.where(no_student | no_teacher, 1, 0.5 * (g - h).square().sum())

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _centred(x: Tensor) -> Tensor:
    """Beginning with the first row, which is exact for rows that are close: of equal ones nothing is left.

    And scaled, which ``cka_loss`` does not notice, so that its products of four features stay within float32.
    """
    x = x - x[:1]
    x = x - x.mean(0)
    return x / power_of_two(x)


def _direction(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix at length 1; and whether it has none, where a one in each place keeps autograd from 0 / 0.

    The sum is torch's, which adds in blocks: its norm of 4096 x 4096 numbers in float32 is off by 1e-3.
    """
    empty = (matrix == 0).all()
    matrix = torch.where(empty, 1, matrix)
    return matrix / matrix.square().sum().sqrt(), empty


def _reduce(squares: Tensor, reduction: str) -> Tensor:
    return squares.sum() if reduction == "sum" or squares.numel() == 0 else squares.mean()
