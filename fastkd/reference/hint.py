r"""The distance between a student's features and a teacher's, element by element or row by row.

With d = s - t of one element, and the mean over the elements that count::

    mse     d^2
    l1      |d|                                       the derivative at 0 is 0
    huber   d^2 / 2            where |d| <= delta
            delta (|d| - delta / 2)         elsewhere

and with s, t rows along the last dimension, and the mean over the rows that count::

    cosine  1 - s . t / (|s| |t|) = |s / |s| - t / |t||^2 / 2

where a row no longer than 1e-12 counts as zero: then the distance is 1 and its gradient 0. An element that the mask
leaves out may hold anything. "sum" does not divide; nothing that counts gives 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._features import Features, Result, result_dtype
from ._gradient import value_and_gradient
from ._normalised import normalised


def hint_loss(
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    distance: str,
    delta: float,
    reduction: str,
    mask: Tensor | None = None,
) -> Result:
    dtype = result_dtype(student, teacher)
    taught = teacher.tensor.to(dtype)
    if mask is not None and mask.is_inference():
        mask = mask.clone()  # autograd saves no tensor of that mode
    by_row = distance == "cosine"

    def formula(s: Tensor) -> Tensor:
        t = taught
        if mask is not None:  # before anything is computed of what does not count
            s, t = torch.where(mask, s, 0), torch.where(mask, t, 0)
        each = _cosine(s, t) if by_row else _of_difference(s - t, distance, delta)
        count = torch.full((), each.numel(), dtype=dtype, device=each.device)
        if mask is not None:
            counts = mask.expand(*each.shape, 1).squeeze(-1) if by_row else mask.expand(each.shape)
            each, count = torch.where(counts, each, 0), counts.sum()
        return each.sum() if reduction == "sum" else each.sum() / count.clamp(min=1)

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _of_difference(d: Tensor, distance: str, delta: float) -> Tensor:
    if distance == "mse":
        return d.square()
    if distance == "l1":
        return d.abs()
    return F.huber_loss(d, torch.zeros_like(d), delta=delta, reduction="none")


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    (s, no_student), (t, no_teacher) = normalised(s, -1), normalised(t, -1)
    return torch.where((no_student | no_teacher).squeeze(-1), 1, 0.5 * (s - t).square().sum(-1))
