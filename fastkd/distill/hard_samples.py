"""Which rows of a batch deserve attention: functions that give weights to ``row_weight`` of a loss on logits.

Each is called with the student's logits ``(..., C)``, the teacher's and the labels ``(...)``, and returns one weight a
row, float32 (float64 for float64 logits), without a gradient. A row whose label is ``ignore_index`` has weight 0.

``reduction="mean"`` divides by the sum of the weights, so that only their ratios matter. With ``"batchmean"``, or where
a ``normalizer`` is given, their size matters too, and ``normalize=True`` makes their mean 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from ..inputs import Head
from ..losses.logit import cross_entropy, kd_loss
from ..losses.wsld import wsld_weights

Logits = Tensor | Head
Teachers = Logits | Sequence[Logits]


class RowWeight:
    """What the classes of this file have in common: ``weigh`` is their formula."""

    normalize: bool

    @torch.no_grad()
    def __call__(
        self, student: Logits, teacher: Teachers, target: Tensor | None, *, dim: int = -1, ignore_index: int = -100
    ) -> Tensor:
        weight = self.weigh(student, teacher, target, dim, ignore_index)
        counts = torch.ones_like(weight) if target is None else (target != ignore_index).to(weight.dtype)
        weight = torch.where(counts == 0, 0.0, weight)
        if not self.normalize:
            return weight
        total = weight.sum(dtype=torch.float64)
        return torch.where(total == 0, 0.0, weight * (counts.sum() / total)).to(weight.dtype)

    @abstractmethod
    def weigh(
        self, student: Logits, teacher: Teachers, target: Tensor | None, dim: int, ignore_index: int
    ) -> Tensor: ...


@dataclass(frozen=True)
class WSLD(RowWeight):
    """:func:`fastkd.wsld_weights`: how much worse than the teacher the student does, from 0 to 1.

    Example:
        >>> WSLD()(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6321])
    """

    normalize: bool = False

    def weigh(self, student: Logits, teacher: Teachers, target: Tensor | None, dim: int, ignore_index: int) -> Tensor:
        return wsld_weights(student, teacher, _labels("WSLD", target), dim=dim, ignore_index=ignore_index)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TeacherGap(RowWeight):
    """How far student and teacher are apart, from 0 to 1; labels are not needed. With p and q their softmaxes::

        weight = (abs(p - q).sum(-1) / 2) ** power

    Example:
        >>> TeacherGap()(torch.zeros(1, 2), torch.tensor([[0.0, float("-inf")]]), None)
        tensor([0.5000])
    """

    power: float = 1.0
    normalize: bool = False

    def __post_init__(self) -> None:
        _checks.not_negative("TeacherGap", "power", self.power)

    def weigh(self, student: Logits, teacher: Teachers, target: Tensor | None, dim: int, ignore_index: int) -> Tensor:
        return _gap(student, teacher, target, "tvd", dim, ignore_index) ** self.power


@dataclass(frozen=True)
class Focal(RowWeight):
    """How unsure the student is of the label, from 0 to 1. With q its softmax and y the label::

        weight = (1 - q[y]) ** gamma

    Source: Lin et al. 2017, arXiv 1708.02002.

    Example:
        >>> Focal()(torch.zeros(1, 2), None, torch.tensor([1]))
        tensor([0.2500])
    """

    gamma: float = 2.0
    normalize: bool = False

    def __post_init__(self) -> None:
        _checks.not_negative("Focal", "gamma", self.gamma)

    def weigh(self, student: Logits, teacher: Teachers, target: Tensor | None, dim: int, ignore_index: int) -> Tensor:
        labels = _labels("Focal", target)
        loss = cross_entropy(student, labels, dim=dim, ignore_index=ignore_index, reduction="none")
        return (-torch.expm1(-loss)) ** self.gamma


@dataclass(frozen=True)
class LossQuantile(RowWeight):
    """1 for the rows with the largest losses, this fraction of them (rounded up), and 0 for all others.

    Args:
        fraction: Of the rows that count, more than 0, at most 1. Of equal losses the first rows are taken.
        by: ``"cross_entropy"`` with the labels, or a ``divergence`` of :func:`fastkd.kd_loss` from the teacher.
        normalize: The mean of the weights becomes 1.

    Source: Shrivastava et al. 2016, arXiv 1604.03540 (online hard example mining).

    Example:
        >>> LossQuantile(0.5)(torch.tensor([[0.0, 2.0], [0.0, 0.0], [5.0, 0.0]]), None, torch.tensor([0, 0, 0]))
        tensor([1., 1., 0.])
    """

    fraction: float
    by: str = "cross_entropy"
    normalize: bool = False

    def __post_init__(self) -> None:
        if not 0 < _checks.number("LossQuantile", "fraction", self.fraction) <= 1:
            _checks.bad_value("LossQuantile", "fraction", "be more than 0 and at most 1", self.fraction)

    def weigh(self, student: Logits, teacher: Teachers, target: Tensor | None, dim: int, ignore_index: int) -> Tensor:
        if self.by == "cross_entropy":
            labels = _labels("LossQuantile", target)
            loss = cross_entropy(student, labels, dim=dim, ignore_index=ignore_index, reduction="none")
        else:
            loss = _gap(student, teacher, target, self.by, dim, ignore_index)
        counts = torch.ones_like(loss, dtype=torch.bool) if target is None else target != ignore_index
        flat = torch.where(counts, loss, -torch.inf).flatten()
        order = flat.argsort(descending=True, stable=True)
        rank = torch.zeros_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        # 0.1 * 30 may be a little more than 3
        taken = (counts.sum().double() * self.fraction - 1e-9).ceil()
        return (rank < taken).view(loss.shape).to(loss.dtype)


def _labels(op: str, target: Tensor | None) -> Tensor:
    if target is None:
        _checks.bad_type(op, "target", "be the labels: the batch has to have some", None)
    return target


def _gap(
    student: Logits, teacher: Teachers, target: Tensor | None, divergence: str, dim: int, ignore_index: int
) -> Tensor:
    """A divergence in each row; the target only says which rows count."""
    return kd_loss(
        student,
        teacher,
        target,
        alpha=0.0,
        divergence=divergence,
        reduction="none",
        dim=dim,
        ignore_index=ignore_index,
    )
