"""Distillation by correlation: :func:`dist_loss`."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from .._features import Features
from ._feature_autograd import loss_of


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    dim: int = -1,
    impl: str | None = None,
) -> Tensor:
    r"""Match how the teacher orders the classes of each sample, and the samples of each class, by correlation.

    With T the temperature, and ``pearson(x, y, d) = cosine(x - x.mean(d), y - y.mean(d))``::

        q, p = softmax(student / T), softmax(teacher / T)
        loss = T**2 * (beta * (1 - pearson(q, p, 1).mean()) + gamma * (1 - pearson(q, p, 0).mean()))

    where 1e-8 is added to the product of the lengths. What is constant correlates with nothing: a row of equal logits,
    a class that is masked (-inf), and in a batch of one row every class, so that gamma then adds the constant
    T**2 gamma. There the gradient is 0; that of nearly constant ones is large, but bounded by 1e8 T.

    Args:
        student: Raw logits ``(..., C)`` of one batch; float16, bfloat16, float32 or float64. Gets a gradient of its
            dtype.
        teacher: Raw logits of the student's shape and device. A constant: it never gets a gradient.
        beta: Weight of the correlation of rows (inter-class), not negative.
        gamma: Weight of the correlation of classes over all rows (intra-class), not negative.
        temperature: T > 0.
        scale_by_t2: Multiply by T^2.
        dim: The class dimension.
        impl: Pin an implementation; :func:`fastkd.explain` lists them.

    Returns:
        The loss, 0-dim: float32, or float64 if any logits are. No rows: 0. Every row enters every class's correlation:
        one with a NaN, a +inf or no finite logit makes the loss NaN.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: the pinned implementation cannot run here. Second derivatives.

    Source: Huang et al. 2022, arXiv 2205.10536.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> round(dist_loss(student, teacher).item(), 4)
        0.5
    """
    op = "dist_loss"
    for argument, value in (("student", student), ("teacher", teacher)):
        _checks.logits(op, argument, value, "a tensor of logits")
    _checks.same_device(op, "teacher", teacher, student)
    if teacher.shape != student.shape:
        _checks.bad_value(op, "teacher", f"have the student's shape, {tuple(student.shape)}", tuple(teacher.shape))
    dim = _checks.dimension(op, dim, student.ndim)
    classes = student.shape[dim]
    if classes == 0:
        _checks.bad_value(op, "student", "have at least one class", f"shape {tuple(student.shape)}")
    t = _checks.positive(op, "temperature", temperature)
    rows, taught = (x.movedim(dim, -1).reshape(-1, classes) for x in (student, teacher.detach()))
    return loss_of(
        op,
        impl,
        rows,
        Features(taught),
        beta=_checks.not_negative(op, "beta", beta),
        gamma=_checks.not_negative(op, "gamma", gamma),
        temperature=t,
        factor=t * t if scale_by_t2 else 1.0,
    )
