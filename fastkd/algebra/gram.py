r"""Losses that compare the inner products of rows, without N x N matrices where the rows are shorter than N.

For S (N, D) and T (N, D'), with the Frobenius norm::

    |S S' - T T'|^2 = |S' S|^2 - 2 |T' S|^2 + |T' T|^2        d / dS = 4 (S (S' S) - T (T' S))

The right side is a difference of numbers that may be many orders larger: everything is summed in float64.
"""

from __future__ import annotations

from torch import Tensor

from .._features import Features, Result, kept, result_dtype
from ._widen import wide, widen


def gram_loss(student: Features, teacher: Features, gradient: bool, *, reduction: str) -> Result:
    loss, slope = _squares(student, teacher, gradient)
    n = student.tensor.shape[0]
    scale = 1.0 if reduction == "sum" or n == 0 else 1.0 / n**2
    dtype = result_dtype(student, teacher)
    return (loss * scale).to(dtype), None if slope is None else (slope * scale).to(dtype)


def _squares(student: Features, teacher: Features, gradient: bool) -> Result:
    s, t = wide(student), wide(teacher)
    if s.shape[0] <= max(s.shape[1], t.shape[1]):
        difference = s @ s.T - _products(teacher)
        return difference.square().sum(), 4 * (difference @ s) if gradient else None
    own, cross = s.T @ s, t.T @ s
    loss = own.square().sum() - 2 * cross.square().sum() + _moments(teacher).square().sum()
    return loss.clamp(min=0), 4 * (s @ own - t @ cross) if gradient else None


@kept
def _products(features: Tensor) -> Tensor:
    """T T', (N, N)"""
    t = widen(features)
    return t @ t.T


@kept
def _moments(features: Tensor) -> Tensor:
    """T' T, (D, D)"""
    t = widen(features)
    return t.T @ t
