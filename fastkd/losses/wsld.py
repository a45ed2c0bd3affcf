"""Soft labels weighed by what is left to learn: :func:`wsld_weights` and :func:`wsld_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, _rows
from ..inputs import Head
from ._compute import compute
from ._logit_arguments import ONE_LOGITS, Logits

NOTHING: dict[str, Any] = {"label_smoothing": 0.0, "z_loss": 0.0, "agreement": False, "beta": 0.0}
NO_TEACHER: dict[str, Any] = {"teacher_temperature": (), "teacher_weight": (), "divergence": "forward_kl"}


def wsld_weights(
    student: Tensor | Head,
    teacher: Tensor | Head,
    target: Tensor,
    *,
    ignore_index: int = -100,
    dim: int = -1,
    impl: str | None = None,
) -> Tensor:
    """How much a student that does worse than its teacher has to learn from each row, for ``row_weight`` of a loss.

    With the cross-entropies of both with the target::

        weight = 1 - exp(-ce_student / (ce_teacher + 1e-7))

    From 0, where the student is certain of the target, to 1, where it is far worse than the teacher (or infinitely
    wrong). Each side is read once, and neither gets a gradient.

    Args:
        student, teacher: Raw logits ``(..., V)`` of the same shape and device; float16, bfloat16, float32 or float64.
            Or a :class:`fastkd.Head` each.
        target: Class ids ``(...)``, the student's shape without ``dim``.
        ignore_index: A row with this target has weight 0.
        dim, impl: As in :func:`fastkd.kd_loss`.

    Returns:
        ``(...)``, float32, or float64 if any logits are. NaN where a row that counts has a NaN, a +inf or no finite
        logit.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastkd.kd_loss`.

    Source: Zhou et al. 2021, arXiv 2102.00650.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2)
        >>> wsld_weights(student, teacher, torch.tensor([0, 0]))
        tensor([0.6321, 0.1673])
    """
    return _weights("wsld_weights", student, teacher, target, ignore_index, dim, impl)


def wsld_loss(
    student: Tensor | Head,
    teacher: Tensor | Head,
    target: Tensor,
    *,
    temperature: float | Tensor = 2.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    overwrite_student: bool = False,
    dim: int = -1,
    impl: str | None = None,
) -> Tensor:
    """Weighted soft labels: the cross-entropy with the teacher, in each row times :func:`wsld_weights`.

    With p = softmax(teacher / T) and q = softmax(student / T)::

        loss = T**2 * (wsld_weights(student, teacher, target) * -(p * log(q)).sum(-1)).mean()

    The weights are constants. For the whole loss of the paper add ``cross_entropy(student, target)``.

    Args:
        student, teacher, target, ignore_index: As in :func:`wsld_weights`. The student gets a gradient of its dtype.
        temperature: T > 0; a number, or a tensor with one per row.
        row_weight: A weight of each row beside that of this loss.
        reduction: ``"none"``, ``"sum"``, ``"batchmean"``, or ``"mean"`` over the rows that count, whatever their
            wsld_weights add up to.
        scale_by_t2, normalizer, overwrite_student, dim, impl: As in :func:`fastkd.kd_loss`.

    Returns:
        As :func:`fastkd.kd_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastkd.kd_loss`.

    Source: Zhou et al. 2021, arXiv 2102.00650.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(wsld_loss(student, teacher, torch.tensor([1])).item(), 4)
        2.7608
    """
    op = "wsld_loss"
    logits = _checked(op, student, teacher, dim)
    own = logits.number("temperature", temperature, _checks.positive)
    given = None if row_weight is None else logits.by_row("row_weight", row_weight)
    weight = _weights(op, student, teacher, target, ignore_index, dim, impl).reshape(-1)
    counts = (_checks.target(op, target, logits.anchor, logits.shape) != ignore_index).to(weight.dtype)
    if given is not None:
        counts = torch.where(counts == 0, 0.0, given)
        weight = torch.where(counts == 0, 0.0, weight * given)
    if reduction == "mean" and normalizer is None:
        normalizer = counts.sum()
    rows = logits.rows(
        None,
        alpha=0.0,
        temperature=own,
        teacher_temperature=(own,),
        teacher_weight=(1.0,),
        divergence="cross_entropy",
        scale_by_t2=bool(scale_by_t2),
        ignore_index=ignore_index,
        row_weight=weight.view(logits.shape),
        reduction=reduction,
        normalizer=normalizer,
        overwrite=overwrite_student,
        **NOTHING,
    )
    return compute(logits, rows, impl)[0]


def _checked(op: str, student: Tensor | Head, teacher: Tensor | Head, dim: int) -> Logits:
    if not isinstance(teacher, (Tensor, Head)):
        _checks.bad_type(op, "teacher", f"be {ONE_LOGITS}", type(teacher).__name__)
    return Logits(op, student, teacher, dim)


def _weights(
    op: str,
    student: Tensor | Head,
    teacher: Tensor | Head,
    target: Tensor,
    ignore_index: int,
    dim: int,
    impl: str | None,
) -> Tensor:
    logits = _checked(op, student, teacher, dim)
    if target is None:
        _checks.bad_type(op, "target", "be a tensor of class ids", "None")
    own, taught = (_cross_entropy(op, side, target, ignore_index, dim, impl) for side in (student, teacher))
    ratio = torch.where(own == torch.inf, own, own / (taught + 1e-7))
    return (-torch.expm1(-ratio)).to(logits.dtype).view(logits.shape)


@torch.no_grad()
def _cross_entropy(
    op: str, side: Tensor | Head, target: Tensor, ignore_index: int, dim: int, impl: str | None
) -> Tensor:
    """(N,) float64"""
    logits = Logits(op, side, (), dim)
    rows = logits.rows(
        target,
        alpha=1.0,
        temperature=1.0,
        scale_by_t2=True,
        ignore_index=ignore_index,
        row_weight=None,
        reduction="none",
        normalizer=None,
        overwrite=False,
        **NOTHING,
        **NO_TEACHER,
    )
    return compute(logits, rows, impl)[1][:, _rows.HARD]
