r"""Losses that compare the inner products of rows, by building both N x N matrices.

With s_i, t_i the rows of student and teacher, whose lengths may differ:

``gram_loss``   sum_ij (s_i . s_j - t_i . t_j)^2 / N^2
"""

from __future__ import annotations

from torch import Tensor

from .._features import Features, Result, result_dtype
from ._gradient import value_and_gradient


def gram_loss(student: Features, teacher: Features, gradient: bool, *, reduction: str) -> Result:
    dtype = result_dtype(student, teacher)
    taught = teacher.tensor.to(dtype)

    def formula(s: Tensor) -> Tensor:
        return _reduce((s @ s.T - taught @ taught.T).square(), reduction)

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _reduce(squares: Tensor, reduction: str) -> Tensor:
    return squares.sum() if reduction == "sum" or squares.numel() == 0 else squares.mean()
