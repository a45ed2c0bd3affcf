"""Attention transfer with one read of each side and without a copy of its squares: a norm along the channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import Features, Result, keep, result_dtype
from .._unit_rows import through_unit_rows, unit_rows


def attention_transfer_loss(
    student: Features, teacher: Features, gradient: bool, *, p: float, convention: str, reduction: str
) -> Result:
    dtype = result_dtype(student, teacher)
    maps = _maps(student.tensor, p, dtype)
    taught, _ = unit_rows(keep(teacher, f"attention, p={p}, {dtype}", lambda: _maps(teacher.tensor, p, dtype)))
    direction, lengths = unit_rows(maps)
    difference = direction - taught
    if convention == "code":
        each, slope = difference.square(), 2 * difference
    else:
        each = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
        slope = torch.where(each == 0, 0, difference / each)
    scale = 1.0 if reduction == "sum" else 1.0 / max(1, each.numel())
    loss = scale * each.sum()
    if not gradient:
        return loss, None
    slope = through_unit_rows(slope, direction, lengths) * (p * scale / max(1, student.tensor.shape[1]))
    return loss, _power(student.tensor.to(dtype), p) * slope.view(len(maps), 1, *student.tensor.shape[2:])


def _maps(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """(samples, positions): the mean over channels of |x|^p"""
    lengths: Tensor = torch.linalg.vector_norm(x, p, dim=1, dtype=dtype)
    return lengths.flatten(1).pow(p) / max(1, x.shape[1])


def _power(x: Tensor, p: float) -> Tensor:
    """The derivative of |x|^p / p."""
    return x if p == 2 else x.sign() * x.abs().pow(p - 1)
