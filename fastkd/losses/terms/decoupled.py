r"""The target against all other ids, and the others among themselves: what dkd_loss and nkd_loss are made of.

With y a row's target, and p' and q' the softmaxes over the other ids at temperature T::

    a = s_y / T - log sum_{j != y} exp(s_j / T)        q_y = sigmoid(a)        1 - q_y = sigmoid(-a)

The log-odds a has all its digits however near q_y is to 0 or 1. What a loss says of the target is a function of the
student's a alone, v(a), and that of the others a divergence D(p', q') by the kernels of kd_loss, without the target.
So the gradient has two parts, and the first is one number a row::

    dv/ds_y = v'(a) / T        dv/ds_j = -v'(a) q'_j / T        dD/ds_j = (q'_j - p'_j) / T

Where a side has no finite logit but the target's, it has no p' (then D = 0) or no q' (then D is infinite).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ..._rows import (
    FIRST_TEACHER,
    HARD,
    SOFT,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    WEIGHT,
    LogitRows,
)
from . import Term
from .weighing import NO_TEACHERS, column, loss_of, squared, upstream

INF = float("inf")
TEACHER_MAX, TEACHER_LOGSUM, OMEGA = FIRST_TEACHER, FIRST_TEACHER + 1, FIRST_TEACHER + 2
NOBODY = 1e30  # a log-sum that makes every probability 0
COLUMNS = 1  # of the state, after those of one teacher

OfTarget = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # log-odds of teacher and student -> v, v'


def binary_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL of (p_y, 1 - p_y) from (q_y, 1 - q_y); v' = q_y - p_y, by the smaller of the two probabilities."""
    value = _surprise(teacher, student) + _surprise(-teacher, -student)
    value = value - _surprise(teacher, teacher) - _surprise(-teacher, -teacher)
    upper = torch.sigmoid(-teacher) - torch.sigmoid(-student)
    return value, torch.where(teacher + student > 0, upper, torch.sigmoid(student) - torch.sigmoid(teacher))


def weighted_cross_entropy(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """-p_y log q_y; v' = -p_y (1 - q_y)."""
    return _surprise(teacher, student), -torch.sigmoid(teacher) * torch.sigmoid(-student)


def _surprise(teacher: Tensor, student: Tensor) -> Tensor:
    """-p log q of the event that has these log-odds; the log-odds decide where it is 0 or infinite."""
    value = -torch.sigmoid(teacher) * F.logsigmoid(student)
    value = torch.where(student == -INF, INF, value)
    return torch.where((teacher == -INF) & ~student.isnan(), 0.0, value)


# operation -> what it says of the target, and whether that is at temperature 1 whatever the temperature of the others
DECOUPLED: dict[str, tuple[OfTarget, bool]] = {
    "dkd_loss": (binary_kl, False),
    "nkd_loss": (weighted_cross_entropy, True),
}


class Decoupled:
    """L = weight (label_weight v + teacher_weight D), with T^2 in both.

    The target's part at a temperature of its own is a hard term, whose weight in each row is the teacher's p_y.
    """

    def __init__(self, dense: Term, op: str) -> None:
        self.dense = dense
        self.of_target, self.at_1 = DECOUPLED[op]

    def forward(self, rows: LogitRows) -> tuple[Tensor, Tensor, Tensor]:
        if rows.student.is_cpu:
            _checks.divisor(rows)  # which the implementation is not asked to divide by
        hard = self._hard(rows)
        problem = replace(rows, without_target=True, alpha=0.5 if hard else 0.0, reduce=False, divisor=1.0)
        loss, state, _ = self.dense.forward(problem)
        student, teacher = _log_odds(rows, state)
        others = torch.where(state[:, STUDENT_LOGSUM] == -INF, INF, state[:, SOFT])
        others = torch.where((state[:, TEACHER_LOGSUM] == -INF) | (rows.teacher_weight[0] == 0), 0.0, others)
        if hard:
            surprise, hard_term = self._surprise_of_teacher(rows), state[:, HARD].clone()
            kept = torch.exp(-surprise)
            value = torch.where(hard_term == INF, INF, kept * hard_term)
            value = torch.where((surprise == INF) & ~hard_term.isnan(), 0.0, value)
            state[:, HARD] = 0.0  # it is in the soft term now
        else:
            value, kept = self.of_target(teacher, student)
            factor = rows.label_weight * squared(rows, state)
            silent = factor == 0
            value, kept = torch.where(silent, 0.0, factor * value), torch.where(silent, 0.0, factor * kept)
            kept = kept / column(rows.temperature, state)
        counts, usable = state[:, WEIGHT] != 0, ~(student.isnan() | teacher.isnan())
        state[:, SOFT] = torch.where(counts, torch.where(usable, value + others, torch.nan), 0.0)
        _without_others(state)
        state = torch.cat([state, torch.where(counts, kept, 0.0).unsqueeze(1)], 1)
        return loss_of(rows, state, loss.dtype)

    def backward(self, rows: LogitRows, state: Tensor, scale: float | Tensor, grad_loss: Tensor) -> Tensor:
        own, kept = state[:, :-COLUMNS].clone(memory_format=torch.contiguous_format), state[:, -1]
        if self._hard(rows):  # p_y times the hard term, and once the others: both are left as weight and alpha
            own[:, WEIGHT] *= 1 + kept
            weight, alpha = own[:, WEIGHT].to(grad_loss.dtype).contiguous(), (kept / (1 + kept)).to(grad_loss.dtype)
            problem = replace(rows, without_target=True, row_weight=weight, alpha=alpha)
        else:
            above = upstream(rows, own, scale, grad_loss)
            slope = torch.where(above == 0, 0.0, above * kept)
            problem = replace(rows, without_target=True, label_slope=slope.to(grad_loss.dtype))
        return self.dense.backward(problem, own, scale, grad_loss)

    def _hard(self, rows: LogitRows) -> bool:
        return self.at_1 and (isinstance(rows.temperature, Tensor) or rows.temperature != 1)

    def _surprise_of_teacher(self, rows: LogitRows) -> Tensor:
        """-log p_y at temperature 1."""
        (teacher,) = rows.teachers
        if rows.student.dtype is torch.float64:
            teacher = teacher.double()
        alone = {"student": teacher, "alpha": 1.0, "temperature": 1.0, "reduce": False, "divisor": 1.0}
        _, state, _ = self.dense.forward(replace(rows, **NO_TEACHERS | alone))
        return state[:, HARD]


def _log_odds(rows: LogitRows, state: Tensor) -> tuple[Tensor, Tensor]:
    """Of the target, by student and teacher; NaN in a row that is none."""
    assert rows.target is not None
    known = (rows.target >= 0) & (rows.target < rows.student.shape[1])
    label = torch.where(known, rows.target, 0).unsqueeze(1)
    temperature = column(rows.temperature, state)
    odds = []
    for logits, highest, logsum in (
        (rows.student, state[:, STUDENT_MAX], state[:, STUDENT_LOGSUM]),
        (rows.teachers[0], state[:, TEACHER_MAX], state[:, TEACHER_LOGSUM]),
    ):
        logit = logits.gather(1, label).squeeze(1).double()
        own = (logit - torch.where(logsum == -INF, 0.0, highest)) / temperature - logsum
        odds.append(torch.where(known & (logit < INF) & (temperature > 0), own, torch.nan))
    return odds[0], odds[1]


def _without_others(state: Tensor) -> None:
    """What backward reads of a side that has but the target: probabilities of 0, and no gradient without p'."""
    for highest, logsum in ((STUDENT_MAX, STUDENT_LOGSUM), (TEACHER_MAX, TEACHER_LOGSUM)):
        nobody = state[:, logsum] == -INF
        if logsum == TEACHER_LOGSUM:
            state[:, OMEGA] = torch.where(nobody, INF, -1.0)
        state[:, highest] = torch.where(nobody, 0.0, state[:, highest])
        state[:, logsum] = torch.where(nobody, NOBODY, state[:, logsum])
