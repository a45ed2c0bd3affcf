r"""Losses of distances and angles, by building the differences of all rows.

With x_i the rows of the student and e_ij = x_j - x_i, d_ij = |e_ij|, n_ij = e_ij / d_ij; rows whose distance is at most
1e-6 of the root mean square over the pairs i != j are coincident, and d_ij = 0, n_ij = 0. Of the teacher's rows the
same, as d', n'. Rows may be divided by their length first (those shorter than 1e-12 become 0). With the Huber function
h(e) = e^2 / 2 up to |e| = delta and delta (|e| - delta / 2) beyond::

    rkd_distance_loss   sum_ij h(d_ij / mu - d'_ij / mu') / N^2       mu the mean over the N (N - 1) pairs i != j
    rkd_angle_loss      sum_ijk h(n_ij . n_ik - n'_ij . n'_ik) / N^3

Where mu is 0, so is d / mu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._features import Features, Result, result_dtype
from .._pairs import COINCIDENT
from .._scale import power_of_two
from ._gradient import value_and_gradient
from .cosine import unit_rows


def rkd_distance_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    return _loss(_relative_distances, student, teacher, gradient, **options)


def rkd_angle_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    return _loss(_cosines, student, teacher, gradient, **options)


def _loss(
    relations: Callable[[Tensor], Tensor],
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    reduction: str,
    delta: float,
    normalize_rows: float,
) -> Result:
    dtype = result_dtype(student, teacher)

    def relations_of(x: Tensor) -> Tensor:
        return relations(unit_rows(x) if normalize_rows else x)

    taught = relations_of(teacher.tensor.to(dtype))

    def formula(s: Tensor) -> Tensor:
        error = relations_of(s) - taught
        h = error.clamp(-delta, delta)
        terms = h * (error - h / 2)
        return terms.sum() if reduction == "sum" or terms.numel() == 0 else terms.mean()

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """e (N, N, D) and d (N, N), both times a number on which neither loss depends."""
    n = x.shape[0]
    e = x[None, :] - x[:, None]
    e = e / power_of_two(e)
    squares = e.square().sum(-1)
    coincident = squares <= COINCIDENT**2 * squares.detach().sum() / max(1, n * (n - 1))
    return e, torch.where(coincident, 1.0, squares).sqrt().masked_fill(coincident, 0)


def _relative_distances(x: Tensor) -> Tensor:
    n = x.shape[0]
    _, d = _differences(x)
    mean = d.sum() / max(1, n * (n - 1))
    return d / torch.where(mean == 0, 1.0, mean)


def _cosines(x: Tensor) -> Tensor:
    e, d = _differences(x)
    coincident = (d == 0)[..., None]
    n = e.masked_fill(coincident, 0) / d[..., None].masked_fill(coincident, 1)
    return n @ n.mT
