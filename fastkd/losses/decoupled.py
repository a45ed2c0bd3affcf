"""The target apart from the other ids: :func:`dkd_loss` and :func:`nkd_loss`, each by the kernels of ``kd_loss``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from ..inputs import Head
from ._compute import compute
from ._logit_arguments import ONE_LOGITS, Logits


def dkd_loss(
    student: Tensor | Head,
    teacher: Tensor | Head,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    overwrite_student: bool = False,
    dim: int = -1,
    impl: str | None = None,
) -> Tensor:
    r"""Decoupled distillation: how sure the teacher is of the target, and what it thinks of the other ids.

    With y the target, p = softmax(teacher / T), q = softmax(student / T), and p', q' the same over the ids but y::

        tckd = kl([p_y, 1 - p_y], [q_y, 1 - q_y])
        nckd = kl(p', q')
        loss = T**2 * (alpha * tckd + beta * nckd)

    where ``kd_loss`` at temperature T weighs the second with 1 - p_y: little, where the teacher is sure. Both are
    finite however far apart the logits are. For the whole loss of the paper add ``cross_entropy(student, target)``, and
    let ``alpha`` and ``beta`` grow over the first epochs.

    Args:
        student: Raw logits ``(..., V)``; float16, bfloat16, float32 or float64. Gets a gradient of its dtype. Or a
            :class:`fastkd.Head`.
        teacher: Raw logits of the student's shape and device, or a :class:`fastkd.Head`. A constant.
        target: Class ids ``(...)``, the student's shape without ``dim``.
        alpha, beta: Weights of the two parts, not negative.
        temperature: T > 0; a number, or a tensor with one per row.
        scale_by_t2, ignore_index, row_weight, reduction, normalizer, overwrite_student, dim, impl: As in
            :func:`fastkd.kd_loss`.

    Returns:
        The loss in nats: float32, or float64 if any logits are. Where no row counts, 0 with zero gradients. With two
        classes nckd is 0. Ids at -inf on both sides do not count. +inf where a student's logit is -inf and the
        teacher's is not, or where that is so of all ids but the target. Where the teacher has no other id than the
        target, nckd is 0. A row with a NaN, a +inf or no finite logit is NaN, and harms no other.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastkd.kd_loss`.

    Source: Zhao et al. 2022, arXiv 2203.08679.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[4.0, 4.0, 0.0]])
        >>> round(dkd_loss(student, teacher, torch.tensor([2])).item(), 4)
        1.3001
    """
    logits = _logits("dkd_loss", student, teacher, dim)
    alpha = _checks.not_negative("dkd_loss", "alpha", alpha)
    beta = _checks.not_negative("dkd_loss", "beta", beta)
    return _loss(
        logits,
        target,
        temperature,
        impl,
        label_weight=alpha,
        teacher_weight=(beta,),
        divergence="forward_kl",
        scale_by_t2=bool(scale_by_t2),
        ignore_index=ignore_index,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=normalizer,
        overwrite=overwrite_student,
    )


def nkd_loss(
    student: Tensor | Head,
    teacher: Tensor | Head,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = True,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    overwrite_student: bool = False,
    dim: int = -1,
    impl: str | None = None,
) -> Tensor:
    r"""Normalised distillation: cross-entropies with the teacher, of the target and of the other ids among themselves.

    With y the target, p and q the softmaxes of teacher and student at temperature 1, and p', q' those over the ids but
    y at temperature T::

        loss = -p_y * log(q_y) - gamma * T**2 * (p' * log(q')).sum()

    For the whole loss of the paper add ``cross_entropy(student, target)``. A temperature other than 1 takes one more
    reading of the teacher's logits, for its p_y.

    Args:
        gamma: Weight of the second part, not negative.
        student, teacher, target, temperature, scale_by_t2, ignore_index, row_weight, reduction, normalizer,
            overwrite_student, dim, impl: As in :func:`dkd_loss`. T^2 is of the second part alone.

    Returns:
        As :func:`dkd_loss`; where it has no other id than the target on one side, the second part is 0 or +inf alike.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fastkd.kd_loss`.

    Source: Yang et al. 2023, arXiv 2303.13005.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[4.0, 4.0, 0.0]])
        >>> round(nkd_loss(student, teacher, torch.tensor([2])).item(), 4)
        1.0497
    """
    logits = _logits("nkd_loss", student, teacher, dim)
    return _loss(
        logits,
        target,
        temperature,
        impl,
        label_weight=1.0,
        teacher_weight=(_checks.not_negative("nkd_loss", "gamma", gamma),),
        divergence="cross_entropy",
        scale_by_t2=bool(scale_by_t2),
        ignore_index=ignore_index,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=normalizer,
        overwrite=overwrite_student,
    )


def _logits(op: str, student: Tensor | Head, teacher: Tensor | Head, dim: int) -> Logits:
    if not isinstance(teacher, (Tensor, Head)):
        _checks.bad_type(op, "teacher", f"be {ONE_LOGITS}", type(teacher).__name__)
    return Logits(op, student, teacher, dim)


def _loss(logits: Logits, target: Tensor, temperature: float | Tensor, impl: str | None, **options: Any) -> Tensor:
    if target is None:
        _checks.bad_type(logits.op, "target", "be a tensor of class ids", "None")
    own = logits.number("temperature", temperature, _checks.positive)
    rows = logits.rows(
        target,
        alpha=0.0,
        temperature=own,
        teacher_temperature=(own,),
        beta=0.0,
        label_smoothing=0.0,
        z_loss=0.0,
        agreement=False,
        **options,
    )
    return compute(logits, rows, impl)[0]
