r"""Losses of similarities between all pairs of rows, by building both N x N matrices.

With s_i, t_i the rows of student and teacher, and cos(s_i, s_j) the cosine of two, 0 if one is no longer than 1e-12:

``pkt_loss``, with q of the teacher's rows what p is of the student's::

    sum_ij q_ij log((q_ij + eps) / (p_ij + eps)) / N^2        p_ij = (1 + cos(s_i, s_j)) / sum_k (1 + cos(s_i, s_k))

``correlation_congruence_loss``, in the forms "taylor" and "neighbours"::

    sum_ij (k(s_i . s_j) - k(t_i . t_j))^2 / N^2              k(c) = exp(-2 gamma) sum_{p <= order} (2 gamma c)^p / p!
    sum_{i < N} |s_i - t_i| . |s_i+1 - t_i+1| / (N - 1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._features import Features, Result, result_dtype
from ._gradient import value_and_gradient
from .cosine import unit_rows


def pkt_loss(student: Features, teacher: Features, gradient: bool, *, eps: float, reduction: str) -> Result:
    dtype = result_dtype(student, teacher)
    taught = _probabilities(teacher.tensor.to(dtype))

    def formula(s: Tensor) -> Tensor:
        return _reduce(taught * ((taught + eps) / (_probabilities(s) + eps)).log(), reduction)

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _probabilities(x: Tensor) -> Tensor:
    units = unit_rows(x)
    similarity = 1 + (units @ units.T).clamp(-1, 1)
    return similarity / similarity.sum(1, keepdim=True)


def correlation_congruence_loss(
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
    dtype = result_dtype(student, teacher)
    taught = teacher.tensor.to(dtype)

    def kernel(x: Tensor) -> Tensor:
        x = unit_rows(x) if normalize_rows else x
        products = x @ x.T
        # exp(-2 gamma) (2 gamma)^p / p!, of which neither power nor factorial has to be a float
        weights = [math.exp(p * math.log(2 * gamma) - 2 * gamma - math.lgamma(p + 1)) for p in range(int(order) + 1)]
        return sum((weight * products**p for p, weight in enumerate(weights)), torch.zeros_like(products))

    def formula(s: Tensor) -> Tensor:
        if form == "taylor":
            return _reduce((kernel(s) - kernel(taught)).square(), reduction)
        gaps = (unit_rows(s) - unit_rows(taught) if normalize_rows else s - taught).abs()
        return _reduce((gaps[:-1] * gaps[1:]).sum(1), reduction)

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _reduce(terms: Tensor, reduction: str) -> Tensor:
    return terms.sum() if reduction == "sum" or terms.numel() == 0 else terms.mean()
