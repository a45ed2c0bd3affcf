r"""Losses of distances and angles, from the squared distances alone.

With u_ij = 1 / d_ij, or 0 where rows are coincident, the cosine at the anchor i of the rows j and k is::

    c_ijk = (Q_ij + Q_ik - Q_jk) u_ij u_ik / 2

so that no sum over the D features is left among the N^3 angles. Of h_ijk = clamp(c_ijk - teacher's, -delta, delta), the
derivative of the Huber function, and f_ijk = h_ijk u_ij u_ik the slopes are::

    P_ij = sum_k f_ijk - u_ij^2 sum_k h_ijk c_ijk - 1/2 sum_i' f_i'ij

For distances, with mu their mean over the N (N - 1) ordered pairs, psi = d / mu and h_ij = clamp(psi_ij - teacher's)::

    P_ij = (h_ij - sum_kl h_kl psi_kl / (N (N - 1))) u_ij / (2 mu)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _pairs
from .._distances import ELEMENTS, pull, squares
from .._features import Features, Result


def rkd_distance_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    return _pairs.loss_of(squares, distances, pull, student, teacher, gradient, power=2, **options)


def rkd_angle_loss(student: Features, teacher: Features, gradient: bool, **options: Any) -> Result:
    return _pairs.loss_of(squares, angles, pull, student, teacher, gradient, power=3, **options)


def distances(student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    (mine, inverse), (taught, _) = _relative(student), _relative(teacher)
    error = mine - taught
    h = error.clamp(-delta, delta)
    shift = (h * mine).sum() / _pairs_of(student)
    return (h * (error - h / 2)).sum(), (h - shift) * inverse


def _relative(squares: Tensor) -> tuple[Tensor, Tensor]:
    """psi, and 1 / (mu d); 0 where rows are coincident."""
    distance = squares.sqrt().masked_fill_(_coincident(squares), 0)
    mean = distance.sum() / _pairs_of(squares)
    mean = torch.where(mean == 0, torch.inf, mean)
    return distance / mean, torch.where(distance == 0, 0.0, 1 / (distance * mean))


def angles(student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    n = student.shape[0]
    total, opposite = student.new_zeros(()), torch.zeros_like(student)
    slopes = torch.empty_like(student)
    mine, theirs = _inverse(student), _inverse(teacher)
    anchors = max(1, ELEMENTS // max(1, n * n))
    for rows in (slice(start, start + anchors) for start in range(0, n, anchors)):
        product = mine[rows, :, None] * mine[rows, None, :]
        cosine = _bend(student, rows) * product
        error = cosine - _bend(teacher, rows) * (theirs[rows, :, None] * theirs[rows, None, :])
        h = error.clamp(-delta, delta)
        total += (h * (error - h / 2)).sum()
        f = product.mul_(h)
        opposite += f.sum(0)
        slopes[rows] = f.sum(2) - mine[rows].square() * (h * cosine).sum(2)
    slopes -= opposite / 2
    return total, slopes + slopes.T


def _bend(squares: Tensor, anchors: slice) -> Tensor:
    return (squares[anchors, :, None] + squares[anchors, None, :] - squares) / 2


def _inverse(squares: Tensor) -> Tensor:
    return squares.rsqrt().masked_fill_(_coincident(squares), 0)


def _coincident(squares: Tensor) -> Tensor:
    return squares <= _pairs.COINCIDENT**2 * squares.sum() / _pairs_of(squares)


def _pairs_of(squares: Tensor) -> int:
    n = squares.shape[0]
    return max(1, n * (n - 1))
