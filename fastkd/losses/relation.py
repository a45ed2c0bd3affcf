"""Distillation of the relations between the samples of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks
from .._features import Features, version_of
from . import _feature_arguments
from ._feature_arguments import REDUCTIONS
from ._feature_autograd import loss_of

if TYPE_CHECKING:
    from ._batch import Group

NORMS = ("l2", "l1")


def gram_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    reduction: str = "mean",
    group: Group = None,
    impl: str | None = None,
) -> Tensor:
    """Match the inner products of all pairs of rows. Same value as::

        F.mse_loss(student @ student.T, teacher @ teacher.T, reduction=reduction)

    in O(N D^2) and without an N x N matrix where rows are shorter than N. The value is then summed in float64.

    Args:
        student: Features ``(N, D)`` of one batch; float16, bfloat16, float32 or float64. Gets a gradient of its dtype.
        teacher: Features ``(N, D')`` of the same samples in the same order, on the same device; D' may differ. Or what
            :func:`fastkd.prepare_teacher` makes of them. A constant: it never gets a gradient.
        reduction: ``"mean"`` over the N^2 pairs, or ``"sum"``.
        group: A process group whose ranks each hold some rows of the batch, not necessarily as many: the loss is that
            of all of them, on every rank. Each rank gets its rows' gradient times the number of ranks, so that the
            average that DistributedDataParallel takes is the gradient of the one loss (as it would be through
            ``torch.distributed.nn.functional.all_gather``). Every rank has to call, and waits for the others. What
            ``prepare_teacher`` keeps is of one rank's rows, and not used.
        impl: Pin an implementation; :func:`fastkd.explain` lists them.

    Returns:
        The loss, 0-dim: float32, or float64 if any features are. No rows: 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; features of different lengths or dtypes on the ranks of a group.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Example:
        >>> gram_loss(torch.eye(2), torch.ones(2, 1))
        tensor(0.5000)
    """
    student, taught = _feature_arguments.rows("gram_loss", student, teacher)
    _checks.choice("gram_loss", "reduction", reduction, REDUCTIONS)
    return loss_of("gram_loss", impl, student, taught, group=group, reduction=reduction)


def cosine_relation_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    reduction: str = "mean",
    group: Group = None,
    impl: str | None = None,
) -> Tensor:
    """Match the cosines between all pairs of rows. Same value as::

        s, t = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        F.mse_loss(s @ s.T, t @ t.T, reduction=reduction)

    A row no longer than 1e-12 counts as zero: its cosines are 0, and so is its gradient.

    Args:
        student, teacher, reduction, group, impl: As in :func:`gram_loss`, as are the result and the errors.

    Example:
        >>> cosine_relation_loss(3 * torch.eye(2), torch.ones(2, 1))
        tensor(0.5000)
    """
    student, taught = _feature_arguments.rows("cosine_relation_loss", student, teacher)
    _checks.choice("cosine_relation_loss", "reduction", reduction, REDUCTIONS)
    return loss_of("cosine_relation_loss", impl, student, taught, group=group, reduction=reduction)


def similarity_preserving_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    norm: str = "l2",
    reduction: str = "mean",
    group: Group = None,
    impl: str | None = None,
) -> Tensor:
    """Match the rows of the matrices of all inner products, each divided by its length. Same value as::

        p = {"l2": 2, "l1": 1}[norm]
        g, h = F.normalize(student @ student.T, p=p, dim=1), F.normalize(teacher @ teacher.T, p=p, dim=1)
        (g - h).square().sum() / len(student) ** 2  # "sum": not divided

    Where rows are shorter than N, ``norm="l2"`` takes O(N D^2) and no N x N matrix; ``"l1"`` compares some rows of both
    matrices at a time. A row of one of the matrices whose norm is at most 1e-12 counts as zero, with gradient 0.

    Args:
        norm: ``"l2"`` as in the paper; ``"l1"`` divides by the sum of absolute values, as torchdistill does.
        student, teacher, reduction, group, impl: As in :func:`gram_loss`, as are the result and the errors. Maps
            ``(N, C, H, W)`` are passed as ``maps.flatten(1)``.

    Source: Tung and Mori 2019, arXiv 1907.09682.

    Example:
        >>> similarity_preserving_loss(torch.eye(2), torch.ones(2, 1))
        tensor(0.2929)
    """
    student, taught = _feature_arguments.rows("similarity_preserving_loss", student, teacher)
    _checks.choice("similarity_preserving_loss", "norm", norm, NORMS)
    _checks.choice("similarity_preserving_loss", "reduction", reduction, REDUCTIONS)
    return loss_of("similarity_preserving_loss", impl, student, taught, group=group, norm=norm, reduction=reduction)


def cka_loss(student: Tensor, teacher: Tensor | Features, *, group: Group = None, impl: str | None = None) -> Tensor:
    """1 minus the linear centred kernel alignment of two batches of features. Same value as::

        s, t = student - student.mean(0), teacher - teacher.mean(0)
        1 - (t.T @ s).norm() ** 2 / ((s.T @ s).norm() * (t.T @ t).norm())

    from 0, where the centred features are equal up to scale and rotation, to 1. If one side is constant (one row is,
    and so is none), the loss is 1 and the gradient 0. Features are centred before any product, those of all ranks
    together.

    Args:
        student, teacher, group, impl: As in :func:`gram_loss`, as are the result and the errors.

    Source: Kornblith et al. 2019, arXiv 1905.00414.

    Example:
        >>> cka_loss(torch.tensor([[0.0, 1], [1, 0], [0, 0]]), torch.tensor([[0.0], [1], [0]]))
        tensor(0.2094)
    """
    student, taught = _feature_arguments.rows("cka_loss", student, teacher)
    return loss_of("cka_loss", impl, student, taught, group=group)


def prepare_teacher(teacher: Tensor) -> Features:
    """Features of a teacher that are passed more than once: what a loss computes from them alone is kept.

    For several losses of one batch, or for a batch that comes again in every epoch. Pass the result where the teacher's
    features went. What is kept is computed when a loss first needs it; under ``torch.compile`` what is there is used,
    but nothing is added.

    Args:
        teacher: Features as the losses take them; they must not change afterwards.

    Returns:
        What losses on features take as their teacher. It can be copied, pickled and kept on a disk.

    Raises:
        TypeError: no tensor of floats. A loss raises RuntimeError where the features were changed in place.

    Example:
        >>> taught = prepare_teacher(torch.ones(2, 1))
        >>> gram_loss(torch.eye(2), taught)
        tensor(0.5000)
    """
    _checks.floats("prepare_teacher", "teacher", teacher)
    return Features(teacher, version=None if torch.compiler.is_compiling() else version_of(teacher))
