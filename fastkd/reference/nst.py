r"""The distance between what the channels of a student and of a teacher respond to.

Of one sample, with s_c, t_c the maps of a channel (its positions as a row) divided by their length, and the kernel
k(a, b) = (a . b)^2, the squared maximum mean discrepancy of both sets of channels is::

    mean_cc' k(s_c, s_c') + mean_cc' k(t_c, t_c') - 2 mean_cc' k(s_c, t_c')  =  |S' S / C_s - T' T / C_t|^2

with the Frobenius norm of (positions, positions) matrices. The loss is its mean over the samples, or its "sum". A
channel no longer than 1e-12 counts as zero, with gradient 0.
"""

from __future__ import annotations

from torch import Tensor

from .._features import Features, Result, result_dtype
from ._gradient import value_and_gradient
from ._normalised import normalised


def nst_loss(student: Features, teacher: Features, gradient: bool, *, reduction: str) -> Result:
    dtype = result_dtype(student, teacher)
    taught = _moments(teacher.tensor.to(dtype))

    def formula(s: Tensor) -> Tensor:
        each = (_moments(s) - taught).square().sum((1, 2))
        return each.sum() if reduction == "sum" or each.numel() == 0 else each.mean()

    return value_and_gradient(formula, student.tensor.to(dtype), gradient)


def _moments(x: Tensor) -> Tensor:
    """S' S / C, (samples, positions, positions)"""
    x, _ = normalised(x.flatten(2), 2)
    return x.mT @ x / max(1, x.shape[1])
