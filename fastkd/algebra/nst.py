r"""Selectivity of channels by the smaller of its matrices: positions by positions, or channels by channels.

For S (C, positions) and T (C', positions) of one sample, whose rows have length 1, with the Frobenius norm::

    |S' S / C - T' T / C'|^2 = |S S'|^2 / C^2 - 2 |S T'|^2 / (C C') + |T T'|^2 / C'^2
    d / dS                   = 4 / C S (S' S / C - T' T / C') = 4 / C (S S' S / C - S T' T / C')

The right sides are differences of numbers that may be many orders larger: these products are summed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import Features, Result, keep, result_dtype
from .._unit_rows import through_unit_rows, unit_rows
from .._widen import chunk_rows, wide_dtype, widen


def nst_loss(student: Features, teacher: Features, gradient: bool, *, reduction: str) -> Result:
    dtype = result_dtype(student, teacher)
    s, lengths = unit_rows(student.tensor.to(dtype).flatten(2))
    t, _ = unit_rows(teacher.tensor.to(dtype).flatten(2))
    scale = 1.0 if reduction == "sum" else 1.0 / max(1, s.shape[0])
    by_positions = s.shape[2] <= max(s.shape[1], t.shape[1])
    loss, slope = (_by_positions if by_positions else _by_channels)(s, t, teacher, gradient, scale)
    return loss, None if slope is None else through_unit_rows(slope, s, lengths).view(student.tensor.shape)


def _by_positions(s: Tensor, t: Tensor, teacher: Features, gradient: bool, scale: float) -> Result:
    own, other = _weights(s, t)
    taught = keep(teacher, f"nst: positions, {s.dtype}", lambda: other * (t.mT @ t))
    difference = own * (s.mT @ s) - taught
    loss = scale * difference.square().sum(dtype=wide_dtype(s))
    return loss.to(s.dtype), s @ (4 * scale * own * difference) if gradient else None


def _by_channels(s: Tensor, t: Tensor, teacher: Features, gradient: bool, scale: float) -> Result:
    own, other = _weights(s, t)
    among_own, across = own * _products(s, s), other * _products(s, t)
    among_other = keep(teacher, f"nst: channels, {s.dtype}", lambda: other * _products(t, t))
    crossed = (own / other) * across.square().sum()
    loss = (scale * (among_own.square().sum() - 2 * crossed + among_other.square().sum())).clamp(min=0)
    slope = None
    if gradient:
        weight = 4 * scale * own
        slope = torch.baddbmm((weight * among_own).to(s.dtype) @ s, (-weight * across).to(s.dtype), t)
    return loss.to(s.dtype), slope


def _weights(s: Tensor, t: Tensor) -> tuple[float, float]:
    return 1 / max(1, s.shape[1]), 1 / max(1, t.shape[1])


def _products(x: Tensor, y: Tensor) -> Tensor:
    """x y' of each sample, in float64."""
    step = chunk_rows(x.flatten(1), y.flatten(1))
    return torch.cat([widen(a) @ widen(b).mT for a, b in zip(x.split(step), y.split(step), strict=True)])
