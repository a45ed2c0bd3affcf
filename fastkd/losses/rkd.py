"""Relational knowledge distillation: the distances between the samples of a batch, and the angles between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _checks
from .._features import Features
from . import _feature_arguments
from ._feature_arguments import REDUCTIONS
from ._feature_autograd import loss_of

if TYPE_CHECKING:
    from ._batch import Group


def rkd_distance_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    delta: float = 1.0,
    normalize_rows: bool = False,
    reduction: str = "mean",
    group: Group = None,
    impl: str | None = None,
) -> Tensor:
    """Match the distances of all pairs of rows, relative to their mean. Same value as::

        def relative(x):
            d = torch.cdist(x, x)
            return d / d[d > 0].mean()

        F.huber_loss(relative(student), relative(teacher), reduction=reduction, delta=delta)

    but from differences of rows, so that close rows far from the origin keep their digits, and with bounded gradients.
    The mean is over the N (N - 1) pairs of different rows. Rows closer than 1e-6 of the root mean square of the
    distances are coincident: their distance is 0, and it has no gradient.

    Args:
        student: Features ``(N, D)`` of one batch; float16, bfloat16, float32 or float64. Gets a gradient of its dtype.
        teacher: Features ``(N, D')`` of the same samples in the same order, on the same device; D' may differ. Or what
            :func:`fastkd.prepare_teacher` makes of them: its distances are then computed once, for
            :func:`rkd_angle_loss` too. A constant: it never gets a gradient.
        delta: Where the Huber function turns linear; 1 as published.
        normalize_rows: Divide each row by its length first, as MMRazor does by default and the paper's code does not. A
            row no longer than 1e-12 counts as zero.
        reduction: ``"mean"`` over all N^2 pairs, as published, or ``"sum"``.
        group, impl: As in :func:`fastkd.gram_loss`.

    Returns:
        The loss, 0-dim: float32, or float64 if any features are. Fewer than two rows: 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; features of different lengths or dtypes on the ranks of a group.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Source: Park et al., Relational Knowledge Distillation, CVPR 2019, arXiv 1904.05068; their weight is 25.

    Example:
        >>> import torch
        >>> rkd_distance_loss(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [10.0], [20.0]]))
        tensor(0.0139)
    """
    return _loss("rkd_distance_loss", impl, student, teacher, delta, normalize_rows, reduction, group)


def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    delta: float = 1.0,
    normalize_rows: bool = False,
    reduction: str = "mean",
    group: Group = None,
    impl: str | None = None,
) -> Tensor:
    """Match the angle at every row between every two others. Same value as::

        def cosines(x):
            e = F.normalize(x[None, :] - x[:, None], dim=-1)
            return e @ e.mT

        F.huber_loss(cosines(student), cosines(teacher), reduction=reduction, delta=delta)

    in O(N^3 + N^2 D) and without an array larger than N x N, and with bounded gradients. Rows closer than 1e-6 of the
    root mean square of the distances are coincident: between them there is no direction, and cosines with it are 0.

    Args:
        student: Features ``(N, D)`` of one batch; float16, bfloat16, float32 or float64. Gets a gradient of its dtype.
        teacher: Features ``(N, D')`` of the same samples in the same order, on the same device; D' may differ. Or what
            :func:`fastkd.prepare_teacher` makes of them: its distances are then computed once, for
            :func:`rkd_distance_loss` too. A constant: it never gets a gradient.
        delta: Where the Huber function turns linear; 1 as published.
        normalize_rows: Divide each row by its length first, as MMRazor does by default and the paper's code does not. A
            row no longer than 1e-12 counts as zero.
        reduction: ``"mean"`` over all N^3 angles, as published, with the 0 and 1 of degenerate ones; or ``"sum"``.
        group, impl: As in :func:`fastkd.gram_loss`.

    Returns:
        The loss, 0-dim: float32, or float64 if any features are. Fewer than two rows: 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; features of different lengths or dtypes on the ranks of a group.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Source: Park et al., Relational Knowledge Distillation, CVPR 2019, arXiv 1904.05068; their weight is 50.

    Example:
        >>> import torch
        >>> rkd_angle_loss(torch.tensor([[0.0, 0], [1, 0], [0, 1]]), torch.tensor([[0.0, 0], [1, 0], [2, 0]]))
        tensor(0.1296)
    """
    return _loss("rkd_angle_loss", impl, student, teacher, delta, normalize_rows, reduction, group)


def _loss(
    op: str,
    impl: str | None,
    student: Any,
    teacher: Any,
    delta: Any,
    normalize_rows: Any,
    reduction: Any,
    group: Group,
) -> Tensor:
    student, taught = _feature_arguments.rows(op, student, teacher)
    delta = _checks.number(op, "delta", delta)
    if not _checks.TINY <= delta <= _checks.HUGE:
        _checks.bad_value(op, "delta", "be positive and finite in float32", delta)
    if not isinstance(normalize_rows, bool):
        _checks.bad_type(op, "normalize_rows", "be a bool", type(normalize_rows).__name__)
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    options = {"delta": delta, "normalize_rows": normalize_rows, "reduction": reduction}
    return loss_of(op, impl, student, taught, group=group, **options)
