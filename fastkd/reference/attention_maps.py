r"""The distance between the spatial attention of a student and of a teacher.

Of features x (channels, positions) of one sample, the attention of position i is q_i = sum_c |x_ci|^p / channels, and
with s and t those maps of student and teacher::

    e = s / |s| - t / |t|
    code    mean over samples and positions of e_i^2
    paper   mean over samples of |e|                  the derivative at 0 is 0

"sum" does not divide. A map no longer than 1e-12 counts as zero, with gradient 0. Positions in rows: what is between
samples and channels does not matter, so neither do the channels' numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._features import Features, Result, result_dtype
from ._gradient import value_and_gradient
from ._normalised import normalised


def attention_transfer_loss(
    student: Features, teacher: Features, gradient: bool, *, p: float, convention: str, reduction: str
) -> Result:
    dtype = result_dtype(student, teacher)
    taught = _attention(teacher.tensor.to(dtype), p)

    def formula(s: Tensor) -> Tensor:
        difference = _attention(s, p) - taught
        if convention == "code":
            each = difference.square()
        else:
            equal = (difference == 0).all(1, keepdim=True)
            each = torch.linalg.vector_norm(torch.where(equal, 1, difference), dim=1, keepdim=True)
            each = torch.where(equal, 0, each)
        return each.sum() if reduction == "sum" or each.numel() == 0 else each.mean()

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _attention(x: Tensor, p: float) -> Tensor:
    """(samples, positions), of length 1 or 0."""
    return normalised(x.flatten(2).abs().pow(p).sum(1) / max(1, x.shape[1]), 1)[0]
