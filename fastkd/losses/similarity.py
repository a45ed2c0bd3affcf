"""Distillation of similarities between the samples of a batch: as probabilities, or through a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._features import Features
from . import _feature_arguments
from ._feature_arguments import REDUCTIONS
from ._feature_autograd import loss_of

if TYPE_CHECKING:
    from ._batch import Group

FORMS = ("taylor", "neighbours")
HIGHEST_ORDER = 32


def pkt_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    eps: float = 1e-7,
    reduction: str = "mean",
    group: Group = None,
    impl: str | None = None,
) -> Tensor:
    """Match, for each row, the probabilities that the cosines with all rows make (probabilistic knowledge transfer).
    Same value as::

        def probabilities(x):
            x = F.normalize(x, dim=1)
            similarity = (x @ x.T + 1) / 2
            return similarity / similarity.sum(1, keepdim=True)

        p, q = probabilities(student), probabilities(teacher)
        (q * ((q + eps) / (p + eps)).log()).mean()  # "sum": .sum()

    summed in float64, some rows of both matrices at a time. A row no longer than 1e-12 counts as zero: its cosines are
    0, and so is its gradient.

    Args:
        eps: As published.
        reduction: ``"mean"`` over all N^2 pairs, as published, or ``"sum"``.
        student, teacher, group, impl: As in :func:`fastkd.gram_loss`, as are the result and the errors.

    Source: Passalis and Tefas 2018, arXiv 1803.10837; RepDistiller's weight is 30000.

    Example:
        >>> import torch
        >>> pkt_loss(torch.eye(2), torch.ones(2, 1))
        tensor(0.0294)
    """
    student, taught = _feature_arguments.rows("pkt_loss", student, teacher)
    eps = _checks.number("pkt_loss", "eps", eps)
    if not _checks.TINY <= eps <= 1:
        _checks.bad_value("pkt_loss", "eps", "be positive in float32 and at most 1", eps)
    _checks.choice("pkt_loss", "reduction", reduction, REDUCTIONS)
    return loss_of("pkt_loss", impl, student, taught, group=group, eps=eps, reduction=reduction)


def correlation_congruence_loss(
    student: Tensor,
    teacher: Tensor | Features,
    *,
    form: str = "taylor",
    gamma: float = 0.4,
    order: int = 2,
    normalize_rows: bool = False,
    reduction: str = "mean",
    group: Group = None,
    impl: str | None = None,
) -> Tensor:
    """Match a kernel of all pairs of rows. Two losses are known by this name. ``form="taylor"`` is the paper's and
    torchdistill's, a Gaussian kernel developed to some order in the inner products. Same value as::

        def kernel(x):
            powers = [(2 * gamma * x @ x.T) ** p / math.factorial(p) for p in range(order + 1)]
            return math.exp(-2 * gamma) * sum(powers)

        F.mse_loss(kernel(student), kernel(teacher), reduction=reduction)

    summed in float64, some rows of both matrices at a time. ``form="neighbours"`` is RepDistiller's, for features of
    the same length, of rows that follow one another::

        gap = (student - teacher).abs()
        (gap[:-1] * gap[1:]).sum(1).mean()  # "sum": .sum(); 0 for a row alone

    With the inner products themselves as the kernel the loss is :func:`fastkd.gram_loss`.

    Args:
        form: ``"taylor"`` or ``"neighbours"``, which takes none of ``gamma`` and ``order``.
        gamma: Of the Gaussian kernel; 0.4 as published.
        order: Of its development, from 1 to 32; 2 as published.
        normalize_rows: Divide each row by its length first: the kernel is Gaussian for rows of length 1 alone.
            torchdistill leaves that to the user. A row no longer than 1e-12 counts as zero.
        reduction: ``"mean"`` over all N^2 pairs, or the N - 1 of neighbours; or ``"sum"``.
        student, teacher, group, impl: As in :func:`fastkd.gram_loss`, as are the result and the errors.

    Source: Peng et al. 2019, arXiv 1904.01802.

    Example:
        >>> import torch
        >>> correlation_congruence_loss(torch.eye(2), torch.ones(2, 1))
        tensor(0.1266)
        >>> correlation_congruence_loss(torch.eye(2), torch.ones(2, 2), form="neighbours")
        tensor(0.)
    """
    op = "correlation_congruence_loss"
    student, taught = _feature_arguments.rows(op, student, teacher)
    _checks.choice(op, "form", form, FORMS)
    if form == "neighbours" and student.shape[1] != taught.tensor.shape[1]:
        rule = f"have rows as long as the student's, {student.shape[1]}, for form='neighbours'"
        _checks.bad_value(op, "teacher", rule, taught.tensor.shape[1])
    gamma = _checks.finite(op, "gamma", gamma)
    if gamma <= 0:
        _checks.bad_value(op, "gamma", "be positive", gamma)
    if _checks.count(op, "order", order) > HIGHEST_ORDER:
        _checks.bad_value(op, "order", f"be at most {HIGHEST_ORDER}", order)
    if not isinstance(normalize_rows, bool):
        _checks.bad_type(op, "normalize_rows", "be a bool", type(normalize_rows).__name__)
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    options: dict[str, float | str] = {
        "form": form,
        "gamma": gamma,
        "order": order,
        "normalize_rows": normalize_rows,
        "reduction": reduction,
    }
    return loss_of(op, impl, student, taught, group=group, **options)
