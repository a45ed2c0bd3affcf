"""Distillation of the relations between the samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._features import Features
from . import _feature_arguments
from ._feature_arguments import REDUCTIONS
from ._feature_autograd import loss_of


def gram_loss(
    student: Tensor, teacher: Tensor | Features, *, reduction: str = "mean", impl: str | None = None
) -> Tensor:
    """Match the inner products of all pairs of rows. Same value as::

        F.mse_loss(student @ student.T, teacher @ teacher.T, reduction=reduction)

    in O(N D^2) and without an N x N matrix where rows are shorter than N. Everything is summed in float64.

    Args:
        student: Features ``(N, D)`` of one batch; float16, bfloat16, float32 or float64. Gets a gradient of its dtype.
        teacher: Features ``(N, D')`` of the same samples in the same order, on the same device; D' may differ. Or what
            :func:`fastkd.prepare_teacher` makes of them. A constant: it never gets a gradient.
        reduction: ``"mean"`` over the N^2 pairs, or ``"sum"``.
        impl: Pin an implementation; :func:`fastkd.explain` lists them.

    Returns:
        The loss, 0-dim: float32, or float64 if any features are. No rows: 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Example:
        >>> gram_loss(torch.eye(2), torch.ones(2, 1))
        tensor(0.5000)
    """
    student, taught = _feature_arguments.rows("gram_loss", student, teacher)
    _checks.choice("gram_loss", "reduction", reduction, REDUCTIONS)
    return loss_of("gram_loss", impl, student, taught, reduction=reduction)


def prepare_teacher(teacher: Tensor) -> Features:
    """Features of a teacher that are passed more than once: what a loss computes from them alone is kept.

    For several losses of one batch, or for a batch that comes again in every epoch. Pass the result where the teacher's
    features went. What is kept is computed when a loss first needs it; under ``torch.compile`` what is there is used,
    but nothing is added.

    Args:
        teacher: Features as the losses take them; they must not change afterwards (RuntimeError).

    Example:
        >>> taught = prepare_teacher(torch.ones(2, 1))
        >>> gram_loss(torch.eye(2), taught)
        tensor(0.5000)
    """
    _checks.floats("prepare_teacher", "teacher", teacher)
    can_change = not torch.compiler.is_compiling() and not teacher.is_inference()
    return Features(teacher, version=teacher._version if can_change else None)
